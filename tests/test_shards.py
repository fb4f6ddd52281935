"""Proves that several jobs can write into one output: tables are the same, whatever the order and number of jobs."""

import os
import pickle
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner

from ldae.cli import main
from ldae.commands.launch import LauncherSettings, parse_settings
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json
from ldae.utils.shards import Shard, remove_marks, shard_override
from small_datasets import bids, brain

pytestmark = pytest.mark.usefixtures("no_worker_processes")

ROOT = Path(__file__).parents[1]
OPTIONS = ("--bias", "none", "--brain", "stripped", "--registration", "none", "--spacing", "4", "-j", "1")
TABLES = ("scans.csv", "rejected.csv", "qc.html")
SCANS = 5  # of which the last cannot be read


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    root = bids(tmp_path_factory.mktemp("shards") / "raw", {f"sub-{n}": brain(seed=n) for n in range(SCANS)})
    (root / f"sub-{SCANS - 1}/anat/sub-{SCANS - 1}_T1w.nii.gz").write_text("not a scan")
    (root / "participants.tsv").write_text("participant_id\tage\nsub-0\t60\nsub-1\t61\n")
    return root


@pytest.fixture(scope="module")
def whole(raw) -> Path:
    """The output of one job."""
    assert preprocess(raw, raw.parent / "whole").exit_code == 0
    return raw.parent / "whole"


@pytest.fixture
def out(raw):
    """An output folder beside that of one job, since tables contain relative paths."""
    folder = raw.parent / "out"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def preprocess(source: Path, out: Path, *options: str):
    return CliRunner().invoke(main, ["preprocess", str(source), str(out), *OPTIONS, *options])


def start(source: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ldae.cli", "preprocess", str(source), str(out), *OPTIONS, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in TABLES]


@pytest.mark.parametrize(
    ("text", "index", "count"), [("1/4", 0, 4), ("4/4", 3, 4), ("0/4", 3, 4), ("1/1", 0, 1), (" 12/100 ", 11, 100)]
)
def test_a_shard_counts_from_one_and_zero_is_the_last(text, index, count):
    assert Shard.parse(text) == Shard(index, count)


@pytest.mark.parametrize("text", ["", "3", "5/4", "1/0", "0/0", "-1/4", "1/4/2", "a/b", "1,4", "1.0/4"])
def test_something_else_is_no_shard(text):
    with pytest.raises(UserError, match="give I/N"):
        Shard.parse(text)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_shards_take_every_item_once(count):
    parts = [Shard.parse(f"{number}/{count}").take(range(10)) for number in range(count)]
    assert sorted(item for part in parts for item in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_only_the_last_shard_finds_the_marks_of_all(tmp_path):
    shards = [Shard(index, 3) for index in (2, 0, 0, 1)]
    assert [shard.mark_finished(tmp_path, "a") for shard in shards] == [False, False, False, True]
    assert not Shard(0, 3).mark_finished(tmp_path, "another list of scans")
    remove_marks(tmp_path)
    assert not Shard(1, 3).mark_finished(tmp_path, "a")


def test_the_option_becomes_an_override():
    assert shard_override(["name=a", "--shard", "2/4"]) == ["name=a", "shard=2/4"]
    assert shard_override(["--shard=2/4", "seed=1"]) == ["shard=2/4", "seed=1"]
    assert shard_override(["seed=1"]) == ["seed=1"]


@pytest.mark.parametrize("order", [("1/2", "2/2"), ("2/3", "0/3", "1/3"), tuple(f"{n}/7" for n in range(7, 0, -1))])
def test_shards_in_any_order_and_number_write_the_same_tables_as_one_job(raw, whole, out, order):
    for shard in order:
        assert not (out / "scans.csv").exists()
        result = preprocess(raw, out, "--shard", shard)
        assert result.exit_code == 0, result.output
    assert tables(out) == tables(whole)


def test_the_same_shard_twice_does_no_harm(raw, whole, out):
    for shard in ("1/2", "1/2", "2/2"):
        assert preprocess(raw, out, "--shard", shard).exit_code == 0
    assert tables(out) == tables(whole)
    assert preprocess(raw, out, "--shard", "1/2").exit_code == 0
    assert tables(out) == tables(whole)


def test_temporary_files_of_a_killed_job_are_removed(raw, whole, out):
    (out / "sub-1/anat").mkdir(parents=True)
    (out / "sub-1/anat/.tmp-00-x.nii.gz").write_text("half")
    for shard in ("1/2", "2/2"):
        assert preprocess(raw, out, "--shard", shard).exit_code == 0
    assert sorted(p.name for p in (out / "sub-1/anat").iterdir()) == sorted(
        p.name for p in (whole / "sub-1/anat").iterdir()
    )
    assert tables(out) == tables(whole)


def test_merge_lists_what_is_finished_and_says_what_is_not(raw, whole, out):
    preprocess(raw, out, "--shard", "1/2")
    result = preprocess(raw, out, "--merge")
    assert result.exit_code == 2
    assert "2 of 5 scans are not preprocessed yet" in result.output
    assert (out / "scans.csv").read_text().count("\n") == 1 + 2
    assert preprocess(raw, out, "--shard", "2/2").exit_code == 0
    assert tables(out) == tables(whole)
    assert preprocess(raw, out, "--merge").exit_code == 0
    assert tables(out) == tables(whole)


def test_merge_finds_scans_that_were_preprocessed_with_other_parameters(raw, whole, out):
    shutil.copytree(whole, out)
    record = read_json(out / "records/sub-2.json")
    write_json(out / "records/sub-2.json", record | {"key": "other" + record["key"]})
    result = preprocess(raw, out, "--merge")
    assert result.exit_code == 2
    assert "1 of 5 scans are not preprocessed yet" in result.output
    assert "sub-2" in result.output


def test_merge_before_any_shard_writes_nothing(raw, out):
    result = preprocess(raw, out, "--merge")
    assert result.exit_code == 2
    assert "run the shards first" in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "3/2"), "give I/N"),
        (("--shard", "1/2", "--merge"), "exclude each other"),
        (("--shards", "4"), "no use without --launcher"),
        (("--set", "launcher.partition=cpu"), "no use without --launcher"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(raw, out, options, message):
    result = preprocess(raw, out, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not out.exists()


@pytest.mark.parametrize("shards", [("1/2", "2/2"), ("1/1", "1/1")])
def test_two_processes_at_once_write_the_same_tables_as_one_job(raw, whole, out, shards):
    jobs = [start(raw, out, "--shard", shard) for shard in shards]
    errors = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    assert tables(out) == tables(whole)


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, ""), (2, 0, ""), (75, 0, "requeue 5_3\n"), (137, 2, "requeue 5_3\n"), (75, 3, "")],
)
def test_a_task_of_the_array_gets_its_shard_and_is_queued_again_if_it_died(tmp_path, status, restarts, requeued):
    scripts = {"work": f'echo "$@" > arguments; exit {status}', "scontrol": 'echo "$@" >> requeued'}
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    task = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": str(restarts)}
    environment = os.environ | task | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "docs/slurm.sbatch"), "work", "IN", "OUT"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == status
    assert (tmp_path / "arguments").read_text() == "IN OUT --shard 3/64\n"
    log = tmp_path / "requeued"
    assert (log.read_text() if log.exists() else "") == requeued


def test_a_task_of_the_array_that_reaches_its_time_limit_stops_its_command_and_is_queued_again(tmp_path):
    work = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('up', flush=True); time.sleep(60)"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" >> requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = os.environ | {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "docs/slurm.sbatch"), sys.executable, "-c", work]
    task = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert task.stdout.readline() == "up\n"
    task.terminate()
    task.communicate(timeout=60)
    assert task.returncode == 143
    assert (tmp_path / "requeued").read_text() == "requeue 5_3\n"


def test_the_launcher_refuses_in_one_line_without_submitit(raw, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    result = preprocess(raw, out, "--launcher", "slurm")
    assert result.exit_code == 2
    assert result.output.strip() == "ldae: --launcher needs submitit: pip install 'ldae[cluster]'"
    assert not out.exists()


def test_settings_of_the_launcher_are_parsed_or_refused():
    settings = parse_settings(["launcher.partition=long", "launcher.mem_gb=4", "launcher.timeout_min=30"])
    assert (settings.partition, settings.mem_gb, settings.timeout_min) == ("long", 4.0, 30)
    assert settings.cpus_per_task == LauncherSettings().cpus_per_task
    for wrong in ("launcher.partitin=long", "launcher.timeout_min=soon"):
        with pytest.raises(UserError, match="the keys of launcher are name, partition"):
            parse_settings([wrong])


class FakeExecutor:
    """In place of submitit's AutoExecutor: runs jobs in this process, in reverse order, after a trip through pickle."""

    failure = ""  # traceback of every job

    def __init__(self, folder, cluster, slurm_max_num_timeout):
        self.made_for, self.parameters, self.jobs = (Path(folder), cluster, slurm_max_num_timeout), {}, []

    def update_parameters(self, **parameters):
        self.parameters |= parameters

    @contextmanager
    def batch(self):
        yield
        for job in reversed(self.jobs):
            job.work()

    def submit(self, work):
        paths = SimpleNamespace(stderr="log.err")
        self.jobs.append(
            SimpleNamespace(work=pickle.loads(pickle.dumps(work)), job_id="7_0", paths=paths, result=self.result)
        )
        return self.jobs[-1]

    def result(self):
        if self.failure:
            raise RuntimeError(self.failure)


@pytest.fixture
def executors(monkeypatch) -> list[FakeExecutor]:
    """The executors that are made from a submitit which is replaced by FakeExecutor."""
    made = []
    module, errors = ModuleType("submitit"), ModuleType("submitit.core.utils")
    module.AutoExecutor = lambda **arguments: made.append(FakeExecutor(**arguments)) or made[-1]
    errors.FailedJobError = errors.UncompletedJobError = RuntimeError
    for name, fake in (("submitit", module), ("submitit.core", ModuleType("core")), ("submitit.core.utils", errors)):
        monkeypatch.setitem(sys.modules, name, fake)
    return made


@pytest.mark.parametrize("wait", ["--wait", "--no-wait"])
def test_the_launcher_submits_shards_that_write_the_same_tables(raw, whole, out, executors, wait):
    settings = ("--launcher", "slurm", "--shards", "3", "--set", "launcher.partition=cpu", "--set", "launcher.mem_gb=9")
    result = preprocess(raw, out, *settings, wait)
    assert result.exit_code == 0, result.output
    (executor,) = executors
    assert executor.made_for == (out / ".submitit", "slurm", LauncherSettings().max_num_timeout)
    assert executor.parameters["slurm_partition"] == "cpu"
    assert executor.parameters["mem_gb"] == 9
    assert [str(job.work.shard) for job in executor.jobs] == ["1/3", "2/3", "3/3"]
    assert tables(out) == tables(whole)


def test_the_launcher_says_why_a_job_failed(raw, out, executors, monkeypatch):
    trace = "Job failed:\nTraceback:\n  line\nldae.utils.errors.UserError: the disk is full\n----\nsee the log"
    monkeypatch.setattr(FakeExecutor, "failure", trace)
    result = preprocess(raw, out, "--launcher", "local", "--shards", "2")
    assert result.exit_code == 2
    assert "2 of 2 jobs failed (the disk is full): see log.err; the same command continues" in result.output
