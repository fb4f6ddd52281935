"""The trainer: it resumes to the bit, averages and clips once per optimiser step, loads intact checkpoints only, logs
no step twice, skips non-finite steps, sets learning rates and stops by signals."""

import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ldae.config import Optim
from ldae.config import TrainerSettings as Settings
from ldae.runs import Run
from ldae.training.changes import changed_keys
from ldae.training.checkpoint import flatten_optimizer, restore_optimizer
from ldae.training.ema import Ema
from ldae.training.health import SpikeDetector
from ldae.training.learning_rate import learning_rate_factor
from ldae.training.optimizer_step import Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.training.trainer import Trainer
from ldae.utils.errors import EXIT_REQUEUE, UserError
from ldae.utils.seeding import draw_normal

DATA = torch.randn(11, 5, generator=torch.Generator().manual_seed(3))


class Toy(Stage):
    """Denoises vectors of five numbers with two layers and dropout."""

    name = "toy"
    monitor = Monitor("error", higher_is_better=False)
    published = ("net",)
    num_samples = len(DATA)

    def __init__(self, on_step=lambda step: None):
        torch.manual_seed(0)
        self.modules = {"net": nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 5))}
        self.on_step = on_step

    def prepare(self, accelerator, trainer, optim, seed):
        net = self.modules["net"]
        self.seed = seed
        self.optimizers = {"net": build_adam(net.parameters(), optim.lr, optim)}
        self.accelerator = accelerator
        self.net = accelerator.prepare(net)
        self.update = Updater(accelerator, self.net, self.optimizers["net"], trainer.clip)
        self.averages = {"net": Ema(net, trainer.ema)}

    def loss(self, batch):
        x = DATA[batch["index"]]
        noise = draw_normal((5,), self.seed, batch["position"])
        return {"loss": (self.net(x + noise) - x).square().mean()}

    def run_step(self, micro_batches, step):
        self.on_step(step)
        return self.take_step(step, (self.update, self.update.accumulate(micro_batches, self.loss)))

    def validate(self):
        return {"error": float((self.modules["net"](DATA) - DATA).square().mean())}


def fit(path, steps, stage=None, optim=None, on_accepted=lambda: None, **settings):
    stage = stage or Toy()
    values = {"max_steps": steps, "batch_size": 3, "accumulate": 2, "log_every": 1, "validate_every": 2, "ema": 0.9}
    values |= {"checkpoint_every": 2, **settings}
    trainer = Trainer(Accelerator(cpu=True), Run(path), Settings(**values), Optim(lr=1e-2, **(optim or {})), seed=5)
    progress = trainer.fit(stage, {"split_hash": "x"}, on_accepted)
    return stage, progress


def test_two_and_two_steps_equal_four_to_the_bit(tmp_path):
    whole, _ = fit(tmp_path / "whole", 4)
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "parts", 4, Toy(on_step=_crash_at(3)))
    resumed, progress = fit(tmp_path / "parts", 4)
    assert progress.step == 4
    for name, tensor in whole.modules["net"].state_dict().items():
        assert torch.equal(tensor, resumed.modules["net"].state_dict()[name])
        assert torch.equal(whole.averages["net"].shadow[name], resumed.averages["net"].shadow[name])
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert lines == expected


def _crash_at(step):
    def on_step(current):
        if current == step:
            raise RuntimeError("crash")

    return on_step


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, caplog):
    fit(tmp_path, 4)
    newest = sorted((tmp_path / "state").glob("*.safetensors"))[-1]
    data = bytearray(newest.read_bytes())
    data[-3] ^= 0xFF
    newest.write_bytes(bytes(data))
    steps = []
    fit(tmp_path, 6, Toy(on_step=steps.append))
    assert steps[0] == 2, "resumed from the checkpoint before the damaged one"
    assert "damaged checkpoint" in caplog.text


def test_averaging_and_clipping_happen_once_per_optimiser_step(tmp_path, monkeypatch):
    updates = []
    original = Ema.update
    monkeypatch.setattr(Ema, "update", lambda self, step, *more: (updates.append(step), original(self, step, *more)))
    clips = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a, **k: (clips.append(1), clip(*a, **k))[1])
    fit(tmp_path, 3, accumulate=4)
    assert updates == [0, 1, 2]
    assert len(clips) == 3


def test_accumulated_micro_batches_give_the_gradient_of_the_whole():
    """Two micro-batches of 3 samples change the weights as one of 6 does."""
    results = []
    for batches in ([[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]]):
        stage = Toy()
        stage.prepare(Accelerator(cpu=True), Settings(ema=0.9), Optim(lr=1e-2), 0)
        stage.modules["net"].eval()
        stage.run_step([{"index": torch.tensor(b), "position": b} for b in batches], 0)
        results.append(stage.modules["net"][0].weight.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_the_published_weights_are_the_average_of_the_best_validation(tmp_path):
    _, progress = fit(tmp_path, 6)
    metadata = Run(tmp_path).metadata
    assert metadata["step"] == progress.best_step
    assert metadata["metrics"]["error"] == pytest.approx(progress.best)
    assert metadata["split_hash"] == "x"


def test_a_non_finite_gradient_never_reaches_the_weights(tmp_path):
    class Poisoned(Toy):
        def loss(self, batch):
            scalars = super().loss(batch)
            return {"loss": scalars["loss"] * float("nan")}

    stage, progress = fit(tmp_path, 2, Poisoned())
    assert all(torch.isfinite(p).all() for p in stage.modules["net"].parameters())
    assert progress.skipped == 2
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"step": 2, "train/skipped": 2} in records


def test_the_host_learns_of_a_skipped_step_one_step_later(tmp_path, caplog):
    """The report of a step is read after the next step has been started."""
    known = {}

    class Once(Toy):
        def loss(self, batch):
            scalars = super().loss(batch)
            return {"loss": scalars["loss"] * (float("nan") if self.now == 1 else 1.0)}

    def on_step(step):
        stage.now = step
        known[step] = "step 1 skipped" in caplog.text

    stage = Once(on_step=on_step)
    fit(tmp_path, 6, stage, log_every=100, validate_every=None, checkpoint_every=100)
    assert known == {0: False, 1: False, 2: False, 3: True, 4: True, 5: True}


class Overflowing(Toy):
    """Trains as in float16: the loss is scaled by a factor that is far too large at first."""

    def prepare(self, accelerator, trainer, optim, seed):
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
        super().prepare(accelerator, trainer, optim, seed)
        self.rates = []

    def loss(self, batch):
        return {"loss": 30 * super().loss(batch)["loss"]}

    def run_step(self, micro_batches, step):
        self.rates.append(self.optimizers["net"].param_groups[0]["lr"])
        return super().run_step(micro_batches, step)


def test_steps_that_overflow_float16_count_neither_as_updates_nor_as_skipped(tmp_path, caplog):
    stage, progress = fit(tmp_path, 12, Overflowing(), optim={"warmup_steps": 12}, validate_every=None)
    assert 2 <= progress.overflowed <= 11
    assert progress.skipped == progress.skipped_in_a_row == 0
    assert "skipped" not in caplog.text
    adam_steps = {int(state["step"]) for state in stage.optimizers["net"].state.values()}
    assert adam_steps == {12 - progress.overflowed} == {progress.updates}
    # The rate rises with the steps that were taken; the host learns of an overflow one step later.
    assert stage.rates[-1] == pytest.approx(1e-2 * (12 - progress.overflowed) / 12, rel=1e-6)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    assert json.loads(text.splitlines()[-1])["train/overflowed"] == progress.overflowed


def test_a_non_finite_loss_is_not_an_overflow(tmp_path, caplog):
    """Its scans are logged, and the gradient scale stays as it is, because a lower one would not help."""

    class Bad(Overflowing):
        def prepare(self, accelerator, *rest):
            super().prepare(accelerator, *rest)
            accelerator.scaler = self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

        def loss(self, batch):
            bad = 4 in batch["index"]
            return {"loss": super().loss(batch)["loss"] * (float("nan") if bad else 1.0)}

    stage, progress = fit(tmp_path, 8, Bad(), validate_every=None)
    assert progress.overflowed == 0
    assert progress.skipped >= 1
    assert "its scans: sample" in caplog.text
    assert stage.scaler.get_scale() == 64


@pytest.mark.parametrize("options", [{"log_every": 1}, {"log_every": 100, "checkpoint_every": 3}])
def test_learning_rates_after_a_skipped_step_do_not_depend_on_when_the_host_learns_of_it(tmp_path, options):
    class Once(Toy):
        def loss(self, batch):
            return {"loss": super().loss(batch)["loss"] * (float("nan") if self.now == 2 else 1.0)}

        def run_step(self, micro_batches, step):
            self.now = step
            return super().run_step(micro_batches, step)

    warm = {"validate_every": None, "optim": {"warmup_steps": 12}}
    whole, _ = fit(tmp_path / "whole", 8, Once(), log_every=100, checkpoint_every=100, **warm)
    fit(tmp_path / "parts", 3, Once(), **options, **warm)  # ends right after the skipped step
    resumed, _ = fit(tmp_path / "parts", 8, Once(), **options, **warm)
    weights = whole.modules["net"].state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in resumed.modules["net"].state_dict().items())


def test_an_average_is_not_updated_by_a_skipped_step():
    net = nn.Linear(3, 2)
    ema = Ema(net, 0.9)
    with torch.no_grad():
        net.weight.add_(1.0)
    before = ema.shadow["weight"].clone()
    ema.update(5, torch.ones(()))
    assert torch.equal(ema.shadow["weight"], before)
    ema.update(5, torch.zeros(()))
    torch.testing.assert_close(ema.shadow["weight"], before + 1 - 6 / 15)


def test_without_warm_up_every_step_keeps_the_published_share_of_the_average():
    net = nn.Linear(3, 2)
    averages = {warmup: Ema(net, 0.999, warmup) for warmup in (True, False)}
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1.0)
    for average in averages.values():
        average.update(0)
    torch.testing.assert_close(averages[False].shadow["weight"], before + 0.001)
    torch.testing.assert_close(averages[True].shadow["weight"], before + 0.9)


class NanScanToy(Toy):
    """One scan is NaN, and it passes through a batch norm before the loss."""

    sample_names = tuple(f"subject{index} ses-M000" for index in range(len(DATA)))

    def __init__(self):
        super().__init__()
        self.modules["net"].insert(0, nn.BatchNorm1d(5))

    def fetch(self, index, position, number):
        x = DATA[torch.as_tensor(index)].clone()
        x[torch.as_tensor(index) == 4] = float("nan")
        return {"x": x}

    def loss(self, batch):
        return {"loss": (self.net(batch["x"]) - 1).square().mean()}


def test_a_scan_with_nan_is_logged_and_changes_neither_weights_nor_averages(tmp_path, caplog):
    stage, progress = fit(tmp_path, 8, NanScanToy())
    assert 0 < progress.skipped < 8
    assert progress.skipped_in_a_row <= progress.skipped
    assert "its scans: subject4 ses-M000" in caplog.text
    for tensors in (stage.modules["net"].state_dict(), stage.averages["net"].shadow):
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_too_many_skipped_steps_end_the_run_after_which_it_resumes_from_the_last_checkpoint(tmp_path):
    def poison(step):
        if step >= 3:
            DATA[:] = float("nan")

    kept = DATA.clone()
    try:
        with pytest.raises(UserError, match=r"3 steps in a row, up to step 5.*the state of step 4 is kept.*sample 0"):
            fit(tmp_path, 20, Toy(on_step=poison), max_skipped=3, validate_every=None)
    finally:
        DATA[:] = kept
    _, progress = fit(tmp_path, 8, max_skipped=3)
    assert progress.step == 8


def test_a_full_disk_is_reported_and_the_checkpoint_before_remains(tmp_path, monkeypatch):
    def full(tensors, path, header=None):
        if "step_00000004" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, header)

    with monkeypatch.context() as patch:
        patch.setattr("ldae.runs.save_file", full)
        with pytest.raises(UserError, match=r"cannot save step 4.*28|No space.*the state of step 2 is kept"):
            fit(tmp_path, 6)
    assert not list((tmp_path / "state").glob(".tmp-*"))
    steps = []
    fit(tmp_path, 6, Toy(on_step=steps.append))
    assert steps[0] == 2


def test_a_run_is_not_resumed_with_other_scans_or_another_global_batch_size(tmp_path):
    fit(tmp_path, 2)
    other = Toy()
    other.sample_names = ("another ses-M000",) * len(DATA)
    with pytest.raises(UserError, match="another training scans"):
        fit(tmp_path, 4, other)
    with pytest.raises(UserError, match="samples a step"):
        fit(tmp_path, 4, batch_size=1)
    fit(tmp_path, 4, batch_size=2, accumulate=3)
    fit(tmp_path, 6, other, accept_changes=True)


def test_what_a_run_stores_beside_its_checkpoints_is_written_only_if_the_run_is_accepted(tmp_path):
    fit(tmp_path, 2)
    other, stored = Toy(), []
    other.sample_names = ("another ses-M000",) * len(DATA)
    with pytest.raises(UserError, match="another training scans"):
        fit(tmp_path, 4, other, on_accepted=lambda: stored.append("refused"))
    fit(tmp_path, 4, on_accepted=lambda: stored.append("accepted"))
    assert stored == ["accepted"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(tmp_path):
    fit(tmp_path, 4)
    for path in (tmp_path / "state").glob("*.safetensors"):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"no checkpoint .* is intact"):
        fit(tmp_path, 6)


def test_a_loss_far_above_the_others_is_a_spike_but_noise_is_not():
    noise = torch.rand(400, generator=torch.Generator().manual_seed(0))
    detector = SpikeDetector()
    assert not any(detector.is_spike(0.1 * (0.5 + float(value))) for value in noise)
    assert detector.is_spike(2.0)


def test_after_a_signal_the_step_is_finished_and_saved_and_the_exit_code_asks_for_a_requeue(tmp_path):
    def on_step(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, 9, Toy(on_step=on_step))
    assert stopped.value.code == EXIT_REQUEUE
    resumed, _ = fit(tmp_path, 9)
    whole, _ = fit(tmp_path / "whole", 9)
    weights = whole.modules["net"].state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in resumed.modules["net"].state_dict().items())


def test_patience_ends_a_run_that_does_not_improve(tmp_path):
    class Stuck(Toy):
        def validate(self):
            return {"error": 1.0}

    _, progress = fit(tmp_path, 100, Stuck(), patience=2)
    assert progress.step == 8, "best at 2, then three validations without improvement"


def test_learning_rate_warms_up_and_decays():
    optim = Optim(warmup_steps=10, final_factor=0.1)
    factors = [learning_rate_factor(step, 100, optim) for step in range(101)]
    assert factors[0] == pytest.approx(0.1, rel=1e-3)
    assert max(factors) == pytest.approx(factors[9], rel=0.02)
    assert factors[100] == pytest.approx(0.1)
    assert all(learning_rate_factor(step, 100, Optim()) == 1.0 for step in (0, 50, 100)), "published: constant"


def test_an_optimiser_restored_from_a_file_continues_exactly_in_channels_last(tmp_path):
    """Fused Adam needs its moments in the memory format of the weights, but files contain contiguous tensors."""

    def step(weight, optimizer, number):
        weight.grad = torch.empty_like(weight).copy_(
            torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        )
        optimizer.step()

    def start():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 3, 3, 3).to(memory_format=torch.channels_last_3d))
        return weight, build_adam([weight], 0.1, Optim(lr=0.1))

    weight, optimizer = start()
    step(weight, optimizer, 1)
    tensors, rest = flatten_optimizer(optimizer)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "state.safetensors")
    resumed, fresh = start()
    resumed.data.copy_(weight.data)
    restore_optimizer(fresh, load_file(tmp_path / "state.safetensors"), rest)
    step(weight, optimizer, 2)
    step(resumed, fresh, 2)
    assert not weight.is_contiguous()
    assert torch.equal(weight, resumed)


def test_validation_once_an_epoch_is_counted_in_optimiser_steps(tmp_path):
    """11 samples, 3 x 2 a step: an epoch is 1.83 steps, two epochs 3.67."""
    for epochs, steps in ((1, 2), (2, 4), (0.1, 1)):
        trainer = Trainer(
            Accelerator(cpu=True), Run(tmp_path), Settings(batch_size=3, accumulate=2, validate_every_epochs=epochs),
            Optim(), seed=5,
        )  # fmt: skip
        assert trainer.validation_interval(len(DATA)) == steps


class FlatToy(Toy):
    """Its training losses are given by `losses`, so that it is known when they stop falling."""

    monitor = Monitor("train_loss", higher_is_better=False)
    publishes_last = True
    losses = (8.0, 8.0, 4.0, 4.0, 6.0, 6.0, 5.0, 5.0, 7.0, 7.0)

    def run_step(self, micro_batches, step):
        result = super().run_step(micro_batches, step)
        result.scalars["loss"] = torch.tensor(self.losses[step])
        return result


def test_training_ends_when_the_mean_training_loss_has_not_fallen_for_patience_validations(tmp_path):
    """Means over two steps: 8, 4, 6, 5, 7. With patience 1 the second one above 4 ends it, at step 8."""
    stage, progress = fit(tmp_path / "whole", 10, FlatToy(), patience=1)
    assert (progress.step, progress.best, progress.best_step) == (8, 4.0, 4)
    published = load_file(tmp_path / "whole" / "weights" / "net.safetensors")
    for name, tensor in stage.averages["net"].state_dict().items():
        assert torch.equal(published[name], tensor), "the last weights, not the best"
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "parts", 10, FlatToy(on_step=_crash_at(5)), patience=1, checkpoint_every=1)
    _, resumed = fit(tmp_path / "parts", 10, FlatToy(), patience=1, checkpoint_every=1)
    assert resumed == progress


def test_a_setting_newer_than_the_run_counts_with_its_default_on_resume():
    before = OmegaConf.create({"trainer": {"batch_size": 4}})
    now = OmegaConf.create({"trainer": {"batch_size": 4, "ema_warmup": True}})
    assert changed_keys(before, now) == ([], [])
    now.trainer.ema_warmup = False
    assert changed_keys(before, now)[0] == ["trainer.ema_warmup: True -> False"]
