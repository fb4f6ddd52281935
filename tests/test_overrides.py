"""Proves that arguments with any characters reach the config as typed, and that Hydra's grammar still works."""

import os

import pytest

from ldae.config import check_constructor_arguments, compose_config
from ldae.utils.errors import UserError
from ldae.utils.overrides import quote_overrides

ODD = [
    "/data/Müller/scans.csv", "/data/a b/scans.csv", "/data/a[1]/scans.csv", "/data/a=b/scans.csv",
    "/data/a&b/scans.csv", "/data/a,b/scans.csv", "/data/it's/scans.csv", "/data/{a}/(b)/scans.csv",
    "/data/#1!/scans.csv", "C:\\new\\scans.csv", "/data/\\'/x.csv", "/data/end\\", "/data/a~b/x.csv",
]  # fmt: skip


@pytest.mark.parametrize("path", ODD)
def test_a_path_arrives_as_it_was_typed(path):
    (argument,) = quote_overrides([f"data.table={path}"])
    config = compose_config("train", ["stage=aekl", "data=table", argument])
    assert config.data.table == path


@pytest.mark.parametrize("name", ["2024_05", "001", "1e5", "true", "a:b", "köln", "a,b"])
def test_a_name_stays_text(name):
    (argument,) = quote_overrides([f"name={name}"])
    assert compose_config("train", ["stage=aekl", argument]).name == name


def test_a_sweep_s_own_folder_can_be_named():
    folder = "runs/x/pretrain@optim.lr=0.01,seed=2"
    (argument,) = quote_overrides([f"stage.pretrain={folder}"])
    assert compose_config("train", ["stage=repr", argument]).stage.pretrain == folder


def test_tilde_is_the_home_folder():
    assert quote_overrides(["data.table=~/scans.csv"]) == [f"data.table={os.path.expanduser('~')}/scans.csv"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "name=a,b"],
        ["--multirun", "optim.lr=1e-4,1e-3", "seed=range(1,4)"],
        ["data.shape=[24,24,24]", "trainer.clip=null", "+x=1", "~probe.age", "name='a b'"],
        ["--cfg", "job", "-c", "hydra", "stage=aekl"],
        ["evaluation=[probes,attention]", "data.table=${paths.data}/x.csv"],
    ],
)
def test_what_hydra_understands_is_left_alone(arguments):
    assert quote_overrides(arguments) == arguments


def test_an_argument_that_sets_nothing_is_refused():
    with pytest.raises(UserError, match=r"cannot read the argument 'scans\.csv': write KEY=VALUE"):
        quote_overrides(["stage=aekl", "scans.csv"])


@pytest.mark.parametrize("argument", ["+datta.x=3", "+trainer.max_step=5", "+data.split.seeds=1"])
def test_a_setting_that_nothing_reads_is_refused(argument):
    config = compose_config("train", ["stage=aekl", "data=phantom", argument])
    with pytest.raises(UserError, match="there is no setting"):
        check_constructor_arguments(config)
