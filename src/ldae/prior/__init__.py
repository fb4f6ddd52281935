"""The semantic prior: a model of the distribution of y, with columns of the table as conditions."""
