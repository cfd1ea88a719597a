"""Training and testing on Lightning, by SlowFast's rules: ``train(cfg)`` and ``test(cfg)``.

Lightning runs the loop, the devices, autocast and DDP; the schedule, the checkpoints and what is
logged are SlowFast's, so that files and lines can be used in either place.
"""

import contextlib
import logging
import os
import pickle
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence

import lightning
import torch
import torch.nn.functional as F
from iopath.common.file_io import g_pathmgr
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from stts_slowfast import schedule
from stts_slowfast.checkpoints import Loaded, load_weights, read_checkpoint, save_checkpoint
from stts_slowfast.standalone import optim
from stts_slowfast.standalone.data import batch_mixer, build_loader
from stts_slowfast.standalone.defaults import check_supported
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.report import Report, log_json_stats, log_to

logger = logging.getLogger(__name__)

INIT_METHOD = "tcp://localhost:9999"
LOSSES = ("cross_entropy", "soft_cross_entropy")
ENSEMBLES = ("sum", "max")


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside; the text says where it goes on, ``status`` for exit."""

    status = 130


# --- the two jobs -------------------------------------------------------------------------------


def train(cfg, init_method: str = INIT_METHOD, callbacks: Sequence[Callback] = ()) -> dict:
    """Trains the model of a config, from the last checkpoint in OUTPUT_DIR where there is one.

    Args:
        cfg: from ``load_config``; it is not changed.
        init_method: ``tcp://host:port`` of shard 0, where there are several processes.
        callbacks: Lightning callbacks that run along; with NUM_GPUS above 1 they are pickled.

    Returns:
        ``checkpoint``, the path of the last one; ``top1_err`` and ``top5_err`` of the last
        validation in percent; ``gflops`` of one clip, ``params``.

    Raises:
        ValueError, FileNotFoundError: for a config, data or checkpoint that cannot be used.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    try:
        return _launch(_train, cfg, init_method, callbacks)
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
        through the model alone, ``gflops`` of one clip, ``params``. Where several numbers of clips
        are tested, of the last one.

    Raises:
        ValueError, FileNotFoundError: for a config, data or checkpoint that cannot be used.
    """
    return _launch(_test, cfg, init_method, callbacks)


def _train(cfg, environment: "Shards", callbacks: Sequence[Callback]) -> dict:
    optim.check_solver(cfg)
    optim.scale_lr_by_shards(cfg)
    _check_choice("MODEL.LOSS_FUNC", cfg.MODEL.LOSS_FUNC, LOSSES)
    lightning.seed_everything(cfg.RNG_SEED, verbose=False)
    _tell_machine(cfg, "Training")
    model = build_model(cfg)
    start = starting_point(cfg, model)
    facts = model_facts(cfg, model, cfg.DATA.TRAIN_CROP_SIZE)
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


def _test(cfg, environment: "Shards", callbacks: Sequence[Callback]) -> dict:
    _check_choice("DATA.ENSEMBLE_METHOD", cfg.DATA.ENSEMBLE_METHOD, ENSEMBLES)
    clips = list(cfg.TEST.NUM_TEMPORAL_CLIPS) or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    clips = [1, 3, 5, 7, 10] if clips == [-1] else clips
    lightning.seed_everything(cfg.RNG_SEED, verbose=False)
    _tell_machine(cfg, "Testing")
    model = build_model(cfg)
    load_for_test(cfg, model)
    facts = model_facts(cfg, model, cfg.DATA.TEST_CROP_SIZE)
    for cfg.TEST.NUM_ENSEMBLE_VIEWS in clips:
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
        epoch_exact: epochs done before this iteration, a fraction of one included.
        stats: what :class:`Report` reads after each batch.
        result: of the last test.
    """

    def __init__(self, cfg, model: nn.Module, start: "Start | None" = None):
        super().__init__()
        self.cfg, self.model, self.start = cfg, model, start
        self.mixer = batch_mixer(cfg)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = optim.build_optimizer(self.model, self.cfg)
        if self.start.optimizer_state:
            optim.load_optimizer_state(optimizer, self.start.optimizer_state, self.start.path)
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
        last = epoch + 1 == self.cfg.SOLVER.MAX_EPOCH
        self.trainer.check_val_every_n_epoch = 1 if last else self.cfg.TRAIN.EVAL_PERIOD

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        self.epoch_exact = self.current_epoch + batch_idx / self.trainer.num_training_batches
        self.lr = optim.lr_at(self.epoch_exact, self.cfg)
        groups = self.optimizers().param_groups
        schedule.set_group_lrs(groups, self.lr, self.epoch_exact, self.cfg)
        schedule.set_progress(self.model, self.epoch_exact / self.cfg.SOLVER.MAX_EPOCH)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        clips, labels = batch[:2]
        if self.mixer is not None:
            clips, labels = self.mixer(clips, labels)
        logits = self.model(clips)
        loss = F.cross_entropy(logits, labels)  # labels: (B,) classes, or (B, classes) shares
        self.losses = torch.stack([loss.detach().float(), *_train_errors(logits.detach(), labels)])
        return loss

    def configure_gradient_clipping(self, optimizer, **_) -> None:
        solver, parameters = self.cfg.SOLVER, list(self.model.parameters())
        limit = solver.CLIP_GRAD_L2NORM
        if solver.CLIP_GRAD_VAL or not limit:
            limit = float("inf")  # then it only measures
        grad_norm = nn.utils.clip_grad_norm_(parameters, limit)
        if solver.CLIP_GRAD_VAL:
            nn.utils.clip_grad_value_(parameters, solver.CLIP_GRAD_VAL)
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
            return self.model(clips.float()).float()


class Clips(lightning.LightningDataModule):
    """The loaders of some splits, each process with its share of the videos."""

    def __init__(self, cfg, environment: "Shards", splits: Sequence[str]):
        super().__init__()
        self.cfg, self.environment = cfg, environment
        self.loaders = {split: build_loader(cfg, split) for split in splits}
        self.datasets = {split: loader.dataset for split, loader in self.loaders.items()}
        for split, data in self.datasets.items():
            views = f" x {data.num_views} views" if split == "test" else ""
            size = self.loaders[split].batch_size
            logger.info("%s: %d videos%s, batches of %d", split, len(data.videos), views, size)

    def train_dataloader(self) -> DataLoader:
        # The order depends on seed and epoch alone; Lightning tells the sampler the epoch.
        data, (rank, world) = self.datasets["train"], self._place()
        return self._loader("train", DistributedSampler(data, world, rank, seed=self.cfg.RNG_SEED))

    def val_dataloader(self) -> DataLoader:
        return self._loader("val", EveryNth(len(self.datasets["val"]), *self._place()))

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", EveryNth(len(self.datasets["test"]), *self._place()))

    def _place(self) -> tuple[int, int]:
        return self.environment.global_rank(), self.environment.world_size()

    def _loader(self, split: str, sampler: Sampler) -> DataLoader:
        loader = self.loaders[split]
        return DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=sampler,
            drop_last=loader.drop_last,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            collate_fn=loader.collate_fn,
            # Workers that are started anew draw from this epoch's seed.
            persistent_workers=split == "val" and loader.persistent_workers,
        )


class EveryNth(Sampler):
    """Items ``rank``, ``rank + world``, ...: over all processes each one once, none repeated."""

    def __init__(self, size: int, rank: int, world: int):
        self.items = range(rank, size, world)

    def __iter__(self):
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


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


def _trainer(cfg, environment: "Shards", callbacks: list[Callback], training: bool):
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


def _ddp(cfg, environment: "Shards") -> DDPStrategy:
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


# --- checkpoints --------------------------------------------------------------------------------


class Start:
    """Where training begins: epoch, and the optimizer's and the scaler's state to go on with.

    ``path`` is the checkpoint it goes on from; None for weights alone.
    """

    def __init__(self, path: str | None = None, checkpoint: dict | None = None):
        checkpoint = checkpoint or {}
        self.path = path
        self.epoch = checkpoint["epoch"] + 1 if path else 0
        self.optimizer_state = checkpoint.get("optimizer_state") if path else None
        self.scaler_state = checkpoint.get("scaler_state") if path else None


def checkpoint_path(cfg, epoch: int) -> str:
    """Where the checkpoint after ``epoch`` epochs lies."""
    task = f"{cfg.TASK}_" if cfg.TASK else ""
    name = f"{task}checkpoint_epoch_{epoch:05d}.pyth"
    return os.path.join(cfg.OUTPUT_DIR, "checkpoints", name)


def last_checkpoint(cfg) -> str | None:
    """The checkpoint of the latest epoch in OUTPUT_DIR; None where there is none."""
    folder = os.path.dirname(checkpoint_path(cfg, 0))
    if not g_pathmgr.isdir(folder):
        return None
    task = re.escape(f"{cfg.TASK}_" if cfg.TASK else "")
    whole = re.compile(rf"{task}checkpoint_epoch_\d+\.pyth")
    names = sorted(name for name in g_pathmgr.ls(folder) if whole.fullmatch(name))
    return os.path.join(folder, names[-1]) if names else None


def starting_point(cfg, model: nn.Module) -> Start:
    """Loads what training starts from into the model.

    The last checkpoint in OUTPUT_DIR with TRAIN.AUTO_RESUME; else TRAIN.CHECKPOINT_FILE_PATH,
    weights alone with TRAIN.CHECKPOINT_EPOCH_RESET; else nothing.

    Raises:
        FileNotFoundError: where a named checkpoint is missing.
        ValueError: where it is not one, or is of another model or another run.
    """
    path = last_checkpoint(cfg) if cfg.TRAIN.AUTO_RESUME else None
    if path:
        checkpoint = read_checkpoint(path)
        loaded = _load(model, checkpoint, path)
        if loaded.missing or loaded.unexpected or loaded.mismatched:
            raise ValueError(
                f"{path} is of another model ({loaded}): choose another OUTPUT_DIR, or set "
                "TRAIN.AUTO_RESUME False"
            )
        logger.info("Resuming from %s", path)
        return Start(path, checkpoint)
    path = cfg.TRAIN.CHECKPOINT_FILE_PATH
    if not path:
        return Start()
    checkpoint = _clear_names(read_checkpoint(path), cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN)
    _load(model, checkpoint, path)
    if cfg.TRAIN.CHECKPOINT_EPOCH_RESET or "epoch" not in checkpoint:
        return Start()
    start = Start(path, checkpoint)
    if start.epoch >= cfg.SOLVER.MAX_EPOCH:
        raise ValueError(
            f"TRAIN.CHECKPOINT_FILE_PATH {path} is after epoch {start.epoch} and SOLVER.MAX_EPOCH "
            f"is {cfg.SOLVER.MAX_EPOCH}: set TRAIN.CHECKPOINT_EPOCH_RESET True to train on from "
            "its weights"
        )
    return start


def load_for_test(cfg, model: nn.Module) -> None:
    """Loads the weights to test into the model, see :func:`test`.

    Raises:
        FileNotFoundError: where a named checkpoint is missing.
        ValueError: where it is not one, or a parameter has another shape than the model's.
    """
    path = cfg.TEST.CHECKPOINT_FILE_PATH or last_checkpoint(cfg) or cfg.TRAIN.CHECKPOINT_FILE_PATH
    if not path:
        logger.warning("No checkpoint is named or found: testing random weights")
        return
    loaded = _load(model, read_checkpoint(path), path)
    if loaded.mismatched:
        raise ValueError(
            f"{path} does not fit the model of this config: {loaded.mismatched[0]}; "
            "MODEL.NUM_CLASSES, DATA.* and MVIT.* must be those it was trained with"
        )


def _load(model: nn.Module, checkpoint: dict, path: str) -> Loaded:
    try:
        logger.info("Loading weights from %s", path)
        return load_weights(model, checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _clear_names(checkpoint: dict, patterns: Sequence[str]) -> dict:
    """Cuts each pattern out of the parameters' names once, as SlowFast does."""
    state = checkpoint.get("model_state")
    if not patterns or not state:
        return checkpoint
    for pattern in patterns:
        state = {name.replace(pattern, "", 1): value for name, value in state.items()}
    return {**checkpoint, "model_state": state}


# --- what stands in the log's first lines -------------------------------------------------------


def model_facts(cfg, model: nn.Module, crop_size: int) -> dict:
    """``params``, and ``gflops`` of one clip as fvcore counts them (None unless LOG_MODEL_INFO)."""
    facts = {"params": sum(p.numel() for p in model.parameters()), "gflops": None}
    logger.info("params: %.2f M", facts["params"] / 1e6)
    if cfg.LOG_MODEL_INFO:
        clip = torch.zeros(1, 3, cfg.DATA.NUM_FRAMES, crop_size, crop_size)
        facts["gflops"] = count_gflops(model, clip)
        logger.info("GFLOPs: %.4g per clip", facts["gflops"])
    return facts


def count_gflops(model: nn.Module, clip: Tensor) -> float:
    """Billions of multiply-adds of one forward pass in evaluation, counted by fvcore."""
    training = model.training
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and of fvcore's own use of torch.jit
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, clip)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        count = analysis.total()
    model.train(training)
    return count / 1e9


def _tell_machine(cfg, job: str) -> None:
    if cfg.NUM_GPUS:
        device = f"{cfg.NUM_GPUS} {torch.cuda.get_device_name(0)}"
    else:
        device = f"CPU ({torch.get_num_threads()} threads)"
    shards = f", shard {cfg.SHARD_ID} of {cfg.NUM_SHARDS}" if cfg.NUM_SHARDS > 1 else ""
    logger.info("%s with Lightning %s on %s%s", job, lightning.__version__, device, shards)


# --- processes ----------------------------------------------------------------------------------


class Shards(LightningEnvironment):
    """Which process this is: NUM_SHARDS machines with NUM_GPUS processes each (one on the CPU)."""

    def __init__(self, cfg, init_method: str, local_rank: int = 0):
        super().__init__()
        match = re.fullmatch(r"tcp://(.+):(\d+)", init_method)
        if match is None:
            raise ValueError(f"--init_method is {init_method!r}: give tcp://host:port of shard 0")
        self._host, self._port = match.group(1), int(match.group(2))
        self._local_rank, self._shard = local_rank, cfg.SHARD_ID
        self.local_world = max(cfg.NUM_GPUS, 1)
        self.processes = self.local_world * cfg.NUM_SHARDS
        self.set_global_rank(cfg.SHARD_ID * self.local_world + local_rank)
        self.set_world_size(self.processes)

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        return self._host

    @property
    def main_port(self) -> int:
        return self._port

    def local_rank(self) -> int:
        return self._local_rank

    def node_rank(self) -> int:
        return self._shard


def _launch(job, cfg, init_method: str, callbacks: Sequence[Callback]) -> dict:
    """Runs a job in this process, or in a process for each GPU of this machine."""
    cfg = cfg.clone()
    cfg.defrost()
    _check_machine(cfg)
    if cfg.NUM_GPUS <= 1:
        return _work(0, job, cfg, init_method, callbacks)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (job, cfg, init_method, callbacks, results)
    # When one process fails PyTorch ends the others, and would tell of each.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        torch.multiprocessing.spawn(_spawned, arguments, nprocs=cfg.NUM_GPUS)
    except torch.multiprocessing.ProcessRaisedException:
        if not results.empty():
            raise results.get() from None
        raise
    return results.get()


def _spawned(local_rank: int, job, cfg, init_method: str, callbacks, results) -> None:
    try:
        result = _work(local_rank, job, cfg, init_method, callbacks)
    except (ValueError, OSError) as error:
        results.put(error)
        raise
    if local_rank == 0:
        results.put(result)


def _work(local_rank: int, job, cfg, init_method: str, callbacks: Sequence[Callback]) -> dict:
    environment = Shards(cfg, init_method, local_rank)
    with log_to(cfg.OUTPUT_DIR, main=environment.global_rank() == 0):
        start = time.perf_counter()
        result = job(cfg, environment, callbacks)
        logger.info("done in %.1f s", time.perf_counter() - start)
        return result


def _check_machine(cfg) -> None:
    check_supported(cfg)
    for key in ("LOG_PERIOD", "NUM_SHARDS"):
        if cfg[key] < 1:
            raise ValueError(f"{key} is {cfg[key]}: it must be at least 1")
    for key in ("EVAL_PERIOD", "CHECKPOINT_PERIOD"):
        if cfg.TRAIN[key] < 1:
            raise ValueError(f"TRAIN.{key} is {cfg.TRAIN[key]}: it must be at least 1")
    if not 0 <= cfg.SHARD_ID < cfg.NUM_SHARDS:
        raise ValueError(
            f"SHARD_ID is {cfg.SHARD_ID} but NUM_SHARDS is {cfg.NUM_SHARDS}: shards count from 0"
        )
    gpus = torch.cuda.device_count()
    if gpus < cfg.NUM_GPUS:
        raise ValueError(
            f"NUM_GPUS is {cfg.NUM_GPUS} but this machine has {gpus}: lower it; 0 uses the CPU"
        )


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is {value!r}: use one of {', '.join(known)}")
