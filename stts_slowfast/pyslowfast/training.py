"""SlowFast's training loop with STTS: parameter groups, sigma, learning rates, and their log."""

from decimal import Decimal

import torch

from stts_slowfast import backbones, schedule
from stts_slowfast.hooks import raise_on_nan
from stts_slowfast.optimizer_groups import plain, run_groups
from stts_slowfast.pyslowfast import checkpoint_loading, distributed, error_log, models, run_state
from stts_slowfast.pyslowfast.config_access import is_enabled
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.pyslowfast.preflight import check_selectors, require_hooks
from stts_slowfast.visualization import film_strip_figure

MAX_PICTURED = 4  # clips of a validation in TensorBoard


def wrap_optimizer(optimizer_module) -> None:
    """``construct_optimizer``, ``get_epoch_lr`` and ``set_lr``, which the training loop calls."""
    wrap(optimizer_module, "construct_optimizer", _construct_optimizer)
    wrap(optimizer_module, "get_epoch_lr", _get_epoch_lr)
    wrap(optimizer_module, "set_lr", _set_lr)


def wrap_log(logging) -> None:
    """``slowfast.utils.logging.log_json_stats``: also logs ``sigma`` and ``backbone_lr``."""
    wrap(logging, "log_json_stats", _log_json_stats)


def wrap_losses(misc) -> None:
    """``slowfast.utils.misc.check_nan_losses``: errors name the selector with NaN scores."""
    wrap(misc, "check_nan_losses", _check_nan_losses)


def wrap_tensorboard(tensorboard_vis) -> None:
    """``TensorboardWriter``: training also logs ``sigma`` and ``backbone_lr`` beside ``Train/lr``,
    and each validation a picture of the tokens that are kept of its first clips."""
    wrap(tensorboard_vis.TensorboardWriter, "add_scalars", _add_scalars)
    wrap(tensorboard_vis.TensorboardWriter, "plot_eval", _plot_eval)


def _construct_optimizer(construct_optimizer, model, cfg):
    require_hooks(cfg)
    check_selectors(model, cfg)
    optimizer = construct_optimizer(model, cfg)
    optimizer.param_groups[:] = models.layer_decay_groups(optimizer.param_groups, model, cfg)
    if is_enabled(cfg):
        optimizer.stts_training = run_state.Training(model, cfg)
        _split_groups(optimizer, model)
        if distributed.rank():
            # SlowFast seeds all processes alike; their noise on the scores must differ.
            torch.manual_seed(cfg.RNG_SEED + 1_000_003 * distributed.rank())
    return optimizer


def _split_groups(optimizer, model) -> None:
    """Splits the optimizer's groups, and again when a saved state is loaded: the state names what
    was new when its run began, such as a head for other classes."""
    unsplit = list(optimizer.param_groups)
    names = {id(parameter): plain(name) for name, parameter in model.named_parameters()}

    def split(state: dict | None = None) -> None:
        saved = (state or {}).get("param_groups", ())
        optimizer.param_groups[:] = run_groups(unsplit, model, names, saved)

    split()
    optimizer.stts_training.split = split
    inner = getattr(optimizer, "optim", optimizer)  # of SlowFast's LARS
    inner.register_load_state_dict_pre_hook(lambda _, state: split(state))


def _get_epoch_lr(get_epoch_lr, cur_epoch, cfg):
    if is_enabled(cfg):
        run_state.schedule_clock(cfg).epoch = cur_epoch
    return get_epoch_lr(cur_epoch, cfg)


def _set_lr(set_lr, optimizer, new_lr):
    training = getattr(optimizer, "stts_training", None)
    # In the first iteration weights and optimizer state are loaded.
    is_first = training is not None and training.clock.epoch is not None and not training.schedule
    if is_first and not any("held_back" in group for group in optimizer.param_groups):
        training.split()
    set_lr(optimizer, new_lr)
    run_state.set_training(training)
    if training is None or training.clock.epoch is None:
        return
    if is_first:
        training.schedule = schedule.Schedule(
            training.model,
            optimizer,
            max_epochs=training.cfg.SOLVER.MAX_EPOCH,
            pretrained=checkpoint_loading.is_pretrained(training.model),
            base_lr=training.cfg.SOLVER.BASE_LR,
            seed=training.cfg.RNG_SEED,
        )
    training.rates = training.schedule.step(training.clock.epoch)


def _check_nan_losses(check_nan_losses, loss):
    try:  # it reads the loss from the device; we read nothing unless it fails
        return check_nan_losses(loss)
    except RuntimeError:
        training = run_state.current_training()
        if training is not None:
            raise_on_nan(training.model)
        raise


def _rates() -> dict[str, float]:
    training = run_state.current_training()
    return training.rates if training is not None else {}


def _log_json_stats(log_json_stats, stats, output_dir=None):
    extra = dict(error_log.epoch_stats(stats))
    if str(stats.get("_type", "")).startswith("train_"):
        # SlowFast rounds floats to five decimals, too few for a rate of 1e-6, and no Decimals.
        extra.update((key, Decimal(f"{rate:.6g}")) for key, rate in _rates().items())
    if extra:
        stats = {**stats, **extra}
    return log_json_stats(stats, output_dir)


def _add_scalars(add_scalars, writer, data_dict, *args, **kwargs):
    if "Train/lr" in data_dict:
        rates = {f"Train/{key}": rate for key, rate in _rates().items()}
        data_dict = {**data_dict, **rates}
    return add_scalars(writer, data_dict, *args, **kwargs)


def _plot_eval(plot_eval, writer, preds, labels, global_step=None):
    plot_eval(writer, preds, labels, global_step)
    training, cfg = run_state.current_training(), writer.cfg
    model = training.model if training is not None else None
    # A test has no global_step.
    if global_step is None or model is None or cfg.MODEL.MODEL_NAME not in backbones.FAMILIES:
        return
    from slowfast.datasets import build_dataset

    data = build_dataset(cfg.TRAIN.DATASET, cfg, "val")
    clips = [data[number][0][0] for number in range(min(MAX_PICTURED, len(data)))]
    classify = lambda clips: model([clips])  # noqa: E731 - SlowFast's heads return probabilities
    figure = film_strip_figure(cfg, getattr(model, "module", model), clips, classify)
    writer.writer.add_figure("Val/kept", figure, global_step)
