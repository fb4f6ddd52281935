"""What a reader of report.html sees without opening anything: six numbers, one edit, what not to trust, the command."""
