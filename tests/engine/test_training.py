"""mmengine's training options on models with GrootV: steps of its Runner with the demo configs of all three tasks."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from torch import nn

from grootvl_mm.apis.checkpoint_files import read_checkpoint
from grootvl_mm.engine.optimizers import CPUAmpOptimWrapper
from tests.helpers.config_cases import random_batch
from tests.helpers.layer_decay import LAYERS, NUM_LAYERS, RATE, groups_of
from tests.helpers.training_runs import CONFIGS, Losses, make_runner, task_config, train, weights, without_batch_norm


@pytest.fixture(params=CONFIGS)
def cfg(request: pytest.FixtureRequest) -> Config:
    return task_config(request.param)


def losses_of(cfg: Config, work_dir: Path, **options: object) -> list[float]:
    losses = Losses()
    train(cfg, work_dir, hooks=[losses], images=2, **options)
    return losses.values


def test_bfloat16_learns_as_float32_does(cfg: Config, tmp_path: Path) -> None:
    exact = losses_of(cfg, tmp_path, steps=6)
    cfg.optim_wrapper.type = CPUAmpOptimWrapper
    rounded = losses_of(cfg, tmp_path, steps=6)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.1)
    assert rounded[-1] < rounded[0]


def test_float16_with_a_scaled_loss_gives_the_gradients_of_float32(cfg: Config, tmp_path: Path) -> None:
    """What ``AmpOptimWrapper`` does, which mmengine has for GPUs only."""
    model = make_runner(cfg, tmp_path).model.train()
    model.init_weights()
    data = model.data_preprocessor(random_batch(cfg), training=True)
    gradients = []
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            features = model.backbone(data["inputs"])
        weighting = torch.Generator().manual_seed(0)
        loss = sum((torch.randn(f.shape, generator=weighting) * f.float()).mean() for f in features)
        scale = 1024.0 if half else 1.0
        (loss * scale).backward()
        assert loss.isfinite()
        gradients.append(nn.utils.parameters_to_vector(p.grad / scale for p in model.backbone.parameters()))
        model.zero_grad()
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.05 * exact.norm()


class Seen(Hook):
    """Keeps the weights with which the model is evaluated."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def before_val_iter(self, runner, **kwargs) -> None:
        self.weights = weights(runner)

    before_test_iter = before_val_iter


def test_averaged_weights_are_evaluated_saved_and_tested(cfg: Config, tmp_path: Path) -> None:
    momentum = 0.25
    ema = {"type": "EMAHook", "momentum": momentum}

    class Average(Hook):
        """The average by its definition."""

        weights: dict[str, torch.Tensor] = {}

        def after_train_iter(self, runner, **kwargs) -> None:
            new = weights(runner)
            old = self.weights or new
            self.weights = {name: old[name] + momentum * (value - old[name]) for name, value in new.items()}

    average, seen = Average(), Seen()
    runner = train(cfg, tmp_path, steps=3, interval=3, hooks=[dict(ema), average, seen])
    checkpoint = read_checkpoint(tmp_path / "iter_3.pth")
    last = weights(runner)
    for name, expected in average.weights.items():
        assert torch.equal(seen.weights[name], checkpoint["state_dict"][name]), name
        torch.testing.assert_close(seen.weights[name], expected, msg=name)
        assert torch.equal(checkpoint["ema_state_dict"][f"module.{name}"], last[name]), name
    assert any(not torch.equal(last[name], value) for name, value in average.weights.items())

    for hooks in ([], [dict(ema)]):
        tested = Seen()
        make_runner(cfg, tmp_path, hooks=[*hooks, tested], checkpoint=tmp_path / "iter_3.pth").test()
        for name, value in tested.weights.items():
            assert torch.equal(value, checkpoint["state_dict"][name]), name


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path: Path) -> None:
    cfg = without_batch_norm(task_config("mmpretrain"))
    # A rule without the square root of Adam, which makes much of the smallest gradients.
    cfg.optim_wrapper.optimizer = {"type": "SGD", "lr": 0.1, "weight_decay": 0.05}
    cfg.param_scheduler = None  # counts the parts
    whole = weights(train(cfg, tmp_path, batch_size=4, steps=2))
    cfg.optim_wrapper.accumulative_counts = 2
    parts = weights(train(cfg, tmp_path, batch_size=2, steps=4))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_clipped(cfg: Config, tmp_path: Path) -> None:
    cfg.optim_wrapper.clip_grad = {"max_norm": 0.01}
    norms = []

    class Norm(Hook):
        def before_train(self, runner) -> None:
            runner.optim_wrapper.optimizer.register_step_pre_hook(
                lambda *_: norms.append(nn.utils.get_total_norm(p.grad for p in runner.model.parameters()).item())
            )

    runner = train(cfg, tmp_path, hooks=[Norm()])
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert runner.message_hub.get_scalar("train/grad_norm").min() > 0.1  # what they were


def test_recomputing_blocks_changes_nothing(cfg: Config, tmp_path: Path) -> None:
    cfg.model.backbone.drop_path_rate = 0.5
    seeded = {"hooks": [{"type": "grootvl_mm.StepSeedHook"}]}
    plain = weights(train(cfg, tmp_path, **seeded))
    cfg.model.backbone.with_cp = True
    for name, value in weights(train(cfg, tmp_path, **seeded)).items():
        assert torch.equal(value, plain[name]), name


def test_layers_learn_at_their_own_rates(cfg: Config, tmp_path: Path) -> None:
    cfg.optim_wrapper.constructor = "grootvl_mm.LayerDecayOptimWrapperConstructor"
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = RATE
    cfg.optim_wrapper.optimizer.weight_decay = 0.0
    cfg.param_scheduler = [{"type": "ConstantLR", "factor": 0.5, "by_epoch": False}]
    base = cfg.optim_wrapper.optimizer.lr

    before = {}

    class Before(Hook):
        def before_train(self, runner) -> None:
            before.update(weights(runner))

    runner = train(cfg, tmp_path, steps=1, hooks=[Before()])
    groups = groups_of(runner.model, runner.optim_wrapper)
    for name, layer in LAYERS.items():
        assert groups[name]["lr"] == pytest.approx(0.5 * base * RATE ** (NUM_LAYERS - 1 - layer)), name
    steps = {}
    for name, after in weights(runner).items():
        layer, _ = runner.model.backbone.get_layer_depth(name, "backbone.")
        steps[layer] = max(steps.get(layer, 0.0), (after - before[name]).abs().max().item())
    # A first step of Adam is as long as the learning rate, where the gradient is not tiny.
    for layer in range(NUM_LAYERS):
        assert steps[layer] == pytest.approx(0.5 * base * RATE ** (NUM_LAYERS - 1 - layer), rel=0.05), layer


def test_frozen_stages_stay_as_they_are(cfg: Config, tmp_path: Path) -> None:
    cfg.model.backbone.frozen_stages = 2
    cfg.model.backbone.drop_path_rate = 0.1
    frozen = ("backbone.stem.", "backbone.stages.0.", "backbone.stages.1.")
    states = []

    class State(Hook):
        def after_train_iter(self, runner, **kwargs) -> None:
            states.append(weights(runner))
            training = [stage.training for stage in runner.model.backbone.stages]
            assert training == [False, False, True, True]

    runner = train(cfg, tmp_path, hooks=[State()])
    learning = set(groups_of(runner.model, runner.optim_wrapper))
    for name, value in states[0].items():
        assert (name in learning) != name.startswith(frozen), name
        assert torch.equal(value, states[1][name]) == name.startswith(frozen), name
