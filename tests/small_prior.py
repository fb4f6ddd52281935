"""Made-up people, their labels and y, and a prior that is fitted on them."""

import numpy as np
import pandas as pd
import torch

from ldae.prior.columns import encode_table, find_columns
from ldae.prior.semantic_prior import SemanticPrior
from ldae.utils.seeding import make_generator

PEOPLE = 300


def made_up_table():
    """Labels of people of whom those with AD are older; one age and one sex are missing."""
    rng = np.random.default_rng(0)
    diagnosis = rng.choice(["CN", "AD", "MCI"], PEOPLE, p=[0.5, 0.3, 0.2])
    age = rng.normal(65, 6, PEOPLE).round(2) + 10 * (diagnosis == "AD")
    table = pd.DataFrame({"diagnosis": diagnosis, "age": age, "sex": rng.choice(["F", "M"], PEOPLE), "path": "x.nii"})
    table.loc[3, "age"], table.loc[5, "sex"] = np.nan, ""
    return table


def made_up_y(table, dim=12):
    """y in 4 of 12 dimensions: the first moves with AD, the second with age, the third has two modes."""
    h = torch.randn(PEOPLE, 4, generator=make_generator(0, "h"))
    h[:, 0] += 3 * torch.from_numpy((table["diagnosis"] == "AD").to_numpy())
    h[:, 1] += torch.from_numpy((table["age"].fillna(65).to_numpy() - 65) / 4).float()
    h[:, 2] = h[:, 2].sign() + 0.1 * h[:, 3]
    return 5 + h @ torch.randn(4, dim, generator=make_generator(0, "axes"))


def made_up_people():
    """Columns, labels (N, 3), y (N, 12) and the table of these people."""
    table = made_up_table()
    columns = find_columns(table, ["diagnosis", "age", "sex"])
    return columns, encode_table(columns, table), made_up_y(table), table


def fitted(people, y=None, **options):
    """A prior fitted on what `made_up_people` returned; its network is untrained."""
    columns, labels, own, _ = people
    y = own if y is None else y
    torch.manual_seed(0)
    prior = SemanticPrior(y.shape[1], [column.to_dict() for column in columns], **{"components": 6, **options})
    prior.fit(y, labels, torch.full((PEOPLE,), 1 / PEOPLE), PEOPLE)
    return prior.eval()
