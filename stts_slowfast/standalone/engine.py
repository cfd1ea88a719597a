"""Training and testing on Lightning, by SlowFast's rules: ``train(cfg)`` and ``test(cfg)``.

Lightning runs the loop, the devices, autocast and DDP; the schedule, the checkpoints and what is
logged are SlowFast's, so that files and lines can be used in either place.
"""

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Sequence

import lightning
import torch
import torch.nn.functional as F
from iopath.common.file_io import g_pathmgr
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import DataLoader

from stts_slowfast import schedule
from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.standalone import optim
from stts_slowfast.standalone.data import UNREADABLE, batch_mixer, build_loader, prepare
from stts_slowfast.standalone.defaults import check_choice
from stts_slowfast.standalone.flops import count_gflops
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.processes import Interrupted, Shards, launch
from stts_slowfast.standalone.report import Report, log_json_stats
from stts_slowfast.standalone.resume import (
    Start,
    checkpoint_path,
    last_checkpoint,
    load_for_test,
    starting_point,
)

logger = logging.getLogger(__name__)

INIT_METHOD = "tcp://localhost:9999"
LOSSES = ("cross_entropy", "soft_cross_entropy")
ENSEMBLES = ("sum", "max")


# --- the two jobs -------------------------------------------------------------------------------


def train(cfg, init_method: str = INIT_METHOD, callbacks: Sequence[Callback] = ()) -> dict:
    """Trains the model of a config, from the last checkpoint in OUTPUT_DIR where there is one.

    Args:
        cfg: from ``load_config``; it is not changed.
        init_method: ``tcp://host:port`` of shard 0, where there are several processes.
        callbacks: Lightning callbacks that run along; with NUM_GPUS above 1 they are pickled.

    Returns:
        ``checkpoint``, the path of the last one; ``top1_err`` and ``top5_err`` of the last
        validation in percent; ``gflops`` of one clip (None unless LOG_MODEL_INFO), ``params``.

    Raises:
        ValueError, FileNotFoundError: for a config, data or checkpoint that cannot be used.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    try:
        return launch(_train, cfg, init_method, callbacks)
    except KeyboardInterrupt as stop:
        last = last_checkpoint(cfg) if cfg.TRAIN.AUTO_RESUME else None
        goes_on = f"goes on from {last}" if last else "begins anew: there is no checkpoint yet"
        interrupted = Interrupted(f"interrupted; the same command {goes_on}")
        interrupted.status = getattr(stop, "status", Interrupted.status)
        raise interrupted from None


def test(cfg, init_method: str = INIT_METHOD, callbacks: Sequence[Callback] = ()) -> dict:
    """Tests with TEST.NUM_ENSEMBLE_VIEWS x TEST.NUM_SPATIAL_CROPS views of every video.

    Args:
        cfg, init_method, callbacks: see :func:`train`. The weights are TEST.CHECKPOINT_FILE_PATH,
            else the last checkpoint in OUTPUT_DIR, else TRAIN.CHECKPOINT_FILE_PATH.

    Returns:
        ``top1_acc`` and ``top5_acc`` in percent, ``num_videos``, ``num_views``, ``clips_per_s``
        through the model alone, ``gflops`` of one clip (None unless LOG_MODEL_INFO), ``params``.
        Where several numbers of clips are tested, of the last one.

    Raises:
        ValueError, FileNotFoundError: for a config, data or checkpoint that cannot be used.
    """
    return launch(_test, cfg, init_method, callbacks)


def _train(cfg, environment: Shards, callbacks: Sequence[Callback]) -> dict:
    optim.check_solver(cfg)
    optim.scale_lr_by_shards(cfg)
    check_choice("MODEL.LOSS_FUNC", cfg.MODEL.LOSS_FUNC, LOSSES)
    lightning.seed_everything(cfg.RNG_SEED, verbose=False)
    _tell_machine(cfg, "Training")
    model = build_model(cfg)
    start = starting_point(cfg, model)
    facts = _model_facts(cfg, environment, model, cfg.DATA.TRAIN_CROP_SIZE)
    data = Clips(cfg, environment, ("train", "val"))
    module = Recognizer(cfg, model, start)
    report, checkpoints = Report(cfg, start.epoch), Checkpoints(cfg, start.path)
    trainer = _trainer(cfg, environment, [report, checkpoints, *callbacks], training=True)
    if start.epoch < cfg.SOLVER.MAX_EPOCH:
        logger.info("Start epoch: %d", start.epoch + 1)
        # Lightning's own way to go on reads Lightning's files; ours are SlowFast's.
        trainer.fit_loop.epoch_progress.current.processed = start.epoch
        trainer.fit_loop.epoch_progress.current.completed = start.epoch
        _run(trainer.fit, module, datamodule=data)
    else:
        logger.info("All %d epochs are done: validating alone", cfg.SOLVER.MAX_EPOCH)
        _run(trainer.validate, module, datamodule=data, verbose=False)
    return {"checkpoint": checkpoints.last, **report.errors, **facts}


def _test(cfg, environment: Shards, callbacks: Sequence[Callback]) -> dict:
    check_choice("DATA.ENSEMBLE_METHOD", cfg.DATA.ENSEMBLE_METHOD, ENSEMBLES)
    clips = list(cfg.TEST.NUM_TEMPORAL_CLIPS) or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    clips = [1, 3, 5, 7, 10] if clips == [-1] else clips
    if min(clips) < 1:
        key = "NUM_TEMPORAL_CLIPS" if cfg.TEST.NUM_TEMPORAL_CLIPS else "NUM_ENSEMBLE_VIEWS"
        raise ValueError(f"TEST.{key} is {cfg.TEST[key]}: test at least 1 clip of every video")
    lightning.seed_everything(cfg.RNG_SEED, verbose=False)
    _tell_machine(cfg, "Testing")
    model = build_model(cfg)
    load_for_test(cfg, model)
    facts = _model_facts(cfg, environment, model, cfg.DATA.TEST_CROP_SIZE)
    for number in clips:
        cfg.TEST.NUM_ENSEMBLE_VIEWS = number
        data = Clips(cfg, environment, ("test",))
        report, module = Report(cfg), Recognizer(cfg, model)
        trainer = _trainer(cfg, environment, [report, *callbacks], training=False)
        _run(trainer.test, module, datamodule=data, verbose=False)
        result = {**module.result, "clips_per_s": report.clips_per_s(), **facts}
    return result


# --- Lightning's three parts: module, data, trainer ---------------------------------------------


class Recognizer(lightning.LightningModule):
    """One training, validation and testing step of a video classifier.

    Attributes:
        lr: the schedule's learning rate in this iteration.
        rates: what ``schedule.step`` says of it: ``sigma`` and ``backbone_lr``, or nothing.
        epoch_exact: epochs done before this iteration, a fraction of one included.
        stats: what :class:`Report` reads after each batch.
        result: of the last test.
    """

    def __init__(self, cfg, model: nn.Module, start: Start | None = None):
        super().__init__()
        self.cfg, self.model, self.start = cfg, model, start
        self.mixer = batch_mixer(cfg)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = optim.build_optimizer(self.model, self.cfg)
        if self.start.optimizer_state:
            optim.load_optimizer_state(optimizer, self.start.optimizer_state, self.start.path)
        schedule.begin(optimizer.param_groups, self.start.trained, self.cfg)
        return optimizer

    def on_fit_start(self) -> None:
        if self.start.scaler_state:
            self.trainer.precision_plugin.load_state_dict(self.start.scaler_state)
        self.start.optimizer_state = self.start.scaler_state = None  # memory

    def on_train_epoch_start(self) -> None:
        epoch = self.current_epoch
        # Every epoch has its own seed, so that a resumed run draws what the whole one would have.
        seed = (self.cfg.RNG_SEED * 1_000_003 + epoch * 1009 + self.global_rank) % 2**32
        lightning.seed_everything(seed, verbose=False)
        self.trainer.datamodule.loaders["train"].set_epoch(epoch)
        last = epoch + 1 == self.cfg.SOLVER.MAX_EPOCH
        self.trainer.check_val_every_n_epoch = 1 if last else self.cfg.TRAIN.EVAL_PERIOD

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        self.epoch_exact = self.current_epoch + batch_idx / self.trainer.num_training_batches
        self.lr = optim.lr_at(self.epoch_exact, self.cfg)
        groups = self.optimizers().param_groups
        self.rates = schedule.step(self.model, groups, self.lr, self.epoch_exact, self.cfg)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        clips, labels = prepare(batch[0], self.cfg), batch[1]
        if self.mixer is not None:
            clips, labels = self.mixer(clips, labels)
        logits = self.model(clips)
        loss = F.cross_entropy(logits, labels)  # labels: (B,) classes, or (B, classes) shares
        self.losses = torch.stack([loss.detach().float(), *_train_errors(logits.detach(), labels)])
        return loss

    def configure_gradient_clipping(self, optimizer, **_) -> None:
        solver = self.cfg.SOLVER
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        if solver.CLIP_GRAD_VAL:
            nn.utils.clip_grad_value_(parameters, solver.CLIP_GRAD_VAL)
        elif solver.CLIP_GRAD_L2NORM:
            nn.utils.clip_grad_norm_(parameters, solver.CLIP_GRAD_L2NORM)
        loss, top1, top5 = self.losses
        self.stats = torch.stack([loss, grad_norm.float(), top1, top5])

    def validation_step(self, batch, batch_idx: int) -> None:
        self.stats = torch.stack(_errors(self._float32_logits(batch[0]), batch[1]))

    def on_test_start(self) -> None:
        data = self.trainer.datamodule.datasets["test"]
        self.views = torch.zeros(len(data.videos), data.num_views, dtype=torch.bool)
        shape = len(data.videos), self.cfg.MODEL.NUM_CLASSES
        self.predictions = torch.zeros(shape)
        self.labels = torch.full(shape[:1], torch.iinfo(torch.int64).min)

    def test_step(self, batch, batch_idx: int) -> None:
        clips, labels, videos, views = batch
        predictions = self._float32_logits(clips).softmax(-1).cpu()
        videos, views = videos.cpu(), views.cpu()
        new = ~self.views[videos, views]  # a view counts once, however often it comes
        videos, views = videos[new], views[new]
        self.views[videos, views] = True
        self.labels[videos] = labels.cpu()[new]
        if self.cfg.DATA.ENSEMBLE_METHOD == "sum":
            self.predictions.index_add_(0, videos, predictions[new])
        else:
            index = videos[:, None].expand_as(predictions[new])
            self.predictions.scatter_reduce_(0, index, predictions[new], "amax")

    def on_test_epoch_end(self) -> None:
        self._gather()
        missing = int((self.views == 0).sum())
        if missing:
            logger.warning("%d of %d views were not tested", missing, self.views.numel())
        if bool((self.labels == UNREADABLE).all()):
            raise ValueError(
                f"none of the {len(self.labels)} test videos can be read: is DATA.PATH_PREFIX "
                f"({self.cfg.DATA.PATH_PREFIX!r}) right?"
            )
        top1, top5 = (100.0 - error.item() for error in _errors(self.predictions, self.labels))
        self.result = {
            "top1_acc": top1,
            "top5_acc": top5,
            "num_videos": self.views.shape[0],
            "num_views": self.views.shape[1],
        }
        if self.trainer.is_global_zero:
            stats = {"top1_acc": f"{top1:.2f}", "top5_acc": f"{top5:.2f}"}
            log_json_stats({"split": "test_final", **stats}, self.cfg.OUTPUT_DIR)
            self._save_results()

    def _gather(self) -> None:
        """Puts together what the processes have seen; each view went to one of them."""

        def reduce(tensor: Tensor, how: str) -> Tensor:
            return self.trainer.strategy.reduce(tensor.to(self.device), reduce_op=how).cpu()

        self.views = reduce(self.views.int(), "sum")
        self.labels = reduce(self.labels, "max")
        self.predictions = reduce(self.predictions, self.cfg.DATA.ENSEMBLE_METHOD)

    def _save_results(self) -> None:
        if name := self.cfg.TEST.SAVE_RESULTS_PATH:
            with g_pathmgr.open(os.path.join(self.cfg.OUTPUT_DIR, name), "wb") as file:
                pickle.dump([self.predictions, self.labels], file)

    def _float32_logits(self, clips: Tensor) -> Tensor:
        """Validation and testing leave autocast, as in SlowFast."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model(prepare(clips, self.cfg)).float()


class Clips(lightning.LightningDataModule):
    """The loaders of some splits, each process with its share of the videos."""

    def __init__(self, cfg, environment: Shards, splits: Sequence[str]):
        super().__init__()
        self.cfg, self.environment = cfg, environment
        rank, world = environment.global_rank(), environment.world_size()
        self.loaders = {split: build_loader(cfg, split, rank, world) for split in splits}
        self.datasets = {split: loader.dataset for split, loader in self.loaders.items()}
        for split, data in self.datasets.items():
            views = f" x {data.num_views} views" if split == "test" else ""
            size = self.loaders[split].views
            logger.info("%s: %d videos%s, batches of %d", split, len(data.videos), views, size)

    def train_dataloader(self) -> DataLoader:
        return self.loaders["train"]

    def val_dataloader(self) -> DataLoader:
        return self.loaders["val"]

    def test_dataloader(self) -> DataLoader:
        return self.loaders["test"]


class Checkpoints(Callback):
    """Writes SlowFast's checkpoints; before the validation, as SlowFast does."""

    def __init__(self, cfg, last: str | None):
        self.cfg, self.last = cfg, last

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        epoch = trainer.current_epoch + 1
        due = epoch % self.cfg.TRAIN.CHECKPOINT_PERIOD == 0 or epoch == self.cfg.SOLVER.MAX_EPOCH
        if not trainer.is_last_batch or not due:
            return
        path = checkpoint_path(self.cfg, epoch)
        if trainer.is_global_zero:
            g_pathmgr.mkdirs(os.path.dirname(path))
            state = optim.optimizer_state(module.optimizers().optimizer, module.model)
            scaler = trainer.precision_plugin.state_dict() or None
            save_checkpoint(path, module.model, self.cfg, epoch - 1, state, scaler)
            logger.info("Wrote %s", path)
        self.last = path


class TensorBoard(TensorBoardLogger):
    """Lightning's, without the file of hyperparameters, which would be empty."""

    def save(self) -> None:
        self.experiment.flush()


def _trainer(cfg, environment: Shards, callbacks: list[Callback], training: bool):
    gpu = cfg.NUM_GPUS > 0
    writer = None
    if training and cfg.TENSORBOARD.ENABLE:
        name = cfg.TENSORBOARD.LOG_DIR or f"runs-{cfg.TRAIN.DATASET}"
        writer = TensorBoard(cfg.OUTPUT_DIR, name, version="")
    bar = sys.stdout.isatty()
    mixed = "16-mixed" if gpu else "bf16-mixed"
    with _quiet():
        return lightning.Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=environment.local_world,
            num_nodes=cfg.NUM_SHARDS,
            strategy=_ddp(cfg, environment) if environment.processes > 1 else "auto",
            plugins=None if environment.processes > 1 else [environment],
            precision=mixed if training and cfg.TRAIN.MIXED_PRECISION else "32-true",
            max_epochs=cfg.SOLVER.MAX_EPOCH,
            logger=writer or False,
            callbacks=[*callbacks, RichProgressBar()] if bar else callbacks,
            default_root_dir=cfg.OUTPUT_DIR,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=bar,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
        )


def _ddp(cfg, environment: Shards) -> DDPStrategy:
    return DDPStrategy(
        cluster_environment=environment,
        process_group_backend=cfg.DIST_BACKEND if cfg.NUM_GPUS else "gloo",
        # All processes set sigma alike, and in validation they may have unequal numbers of batches.
        broadcast_buffers=False,
        ddp_comm_hook=fp16_compress_hook if cfg.MODEL.FP16_ALLREDUCE else None,
    )


def _run(what, *args, **kwargs) -> None:
    """Runs one of a trainer's functions; what stops it from outside becomes ``Interrupted``."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with _quiet():
            what(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit) as stop:
        interrupted = Interrupted("interrupted")
        if isinstance(stop, SIGTERMException):
            interrupted.status = 128 + signal.SIGTERM
        raise interrupted from None
    finally:
        if main:  # Lightning leaves Ctrl-C switched off after the first one
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _quiet():
    """Keeps Lightning's tips and guesses about the run away; its errors come through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.utils\.data")
            yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)


# --- errors in percent --------------------------------------------------------------------------


def _errors(predictions: Tensor, labels: Tensor) -> list[Tensor]:
    """Top-1 and top-5 error in percent of predictions (B, classes) for labels (B,)."""
    best = predictions.topk(min(5, predictions.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return [100.0 - 100.0 * hits[:, :k].any(1).float().mean() for k in (1, 5)]


def _train_errors(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """As :func:`_errors`; of a mixed clip either class is right: SlowFast adds their logits."""
    if labels.dim() == 1:
        return _errors(logits, labels)
    first, second = labels.topk(2, dim=1).indices.unsqueeze(-1).unbind(1)
    logits = logits.float()
    logits = logits.scatter_add(1, first, logits.gather(1, second)).scatter(1, second, 0.0)
    return _errors(logits, first.squeeze(1))


# --- what stands in the log's first lines -------------------------------------------------------


def _model_facts(cfg, environment: Shards, model: nn.Module, crop_size: int) -> dict:
    """``params``, and ``gflops`` of one clip (of the first process, if LOG_MODEL_INFO)."""
    facts = {"params": sum(p.numel() for p in model.parameters()), "gflops": None}
    logger.info("params: %.2f M", facts["params"] / 1e6)
    if cfg.LOG_MODEL_INFO and environment.global_rank() == 0:
        clip = torch.zeros(1, 3, cfg.DATA.NUM_FRAMES, crop_size, crop_size)
        facts["gflops"] = count_gflops(model, clip)
        logger.info("GFLOPs: %.4g per clip", facts["gflops"])
    return facts


def _tell_machine(cfg, job: str) -> None:
    if cfg.NUM_GPUS:
        device = f"{cfg.NUM_GPUS} {torch.cuda.get_device_name(0)}"
    else:
        device = f"CPU ({torch.get_num_threads()} threads)"
    shards = f", shard {cfg.SHARD_ID} of {cfg.NUM_SHARDS}" if cfg.NUM_SHARDS > 1 else ""
    logger.info("%s with Lightning %s on %s%s", job, lightning.__version__, device, shards)
