"""Mutation tests: ``python tests/mutations.py [NAME ...]``.

Each row breaks one promise in a copy of the repository and runs the tests that must fail.
``--list`` prints the rows. The exit status is 1 if a change passes the tests or its line is not
found.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "stts_slowfast"
TIME_LIMIT = 600.0  # seconds for the tests of a row


@dataclass(frozen=True)
class Mutation:
    """Replaces ``line``, which occurs once in ``file``; then ``tests`` must fail."""

    file: str
    line: str
    replacement: str
    tests: str  # arguments of pytest


ENGINE = "tests/standalone/test_engine.py"
PROCESSES = "tests/standalone/test_launch.py"
STOPS = "tests/standalone/test_signals.py"
TOPK, FILES = "tests/test_topk.py", "tests/checkpoints/test_io.py"
CHECK, CLIPS = "tests/checkpoints/test_validate.py", "tests/pyslowfast/test_lazy_clip.py"
GUARD, BAD = "tests/pyslowfast/test_preflight.py", "tests/slowfast/test_error_log.py"

MUTATIONS = {
    "kept-tokens-merge-into-others": Mutation(
        "token_selector.py",
        "nearest = nearest.scatter(1, kept, own)[:, :, None]",
        "nearest = nearest[:, :, None]",
        "tests/test_token_selector.py -k half_precision",
    ),
    "merged-tokens-of-other-frames": Mutation(
        "token_selector.py",
        "kept = kept.remainder(grouped.shape[1])",
        "kept = kept.clamp(max=grouped.shape[1] - 1)",
        "tests/test_token_selector.py -k merged",
    ),
    "weights-stay-cast": Mutation(
        "evaluation.py",
        "                layer._parameters[key] = original\n",
        "                pass\n",
        "tests/test_evaluation.py -k restores",
    ),
    "hooks-added-later-are-not-seen": Mutation(
        "fused/replacement.py",
        "            and not any(any(each[1:]) for each in hooks)\n",
        "",
        "tests/fused/test_replacement.py -k checked_once",
    ),
    "padded-keys-count-once": Mutation(
        "fused/video_swin.py",
        "padding.logsumexp(3, keepdim=True)",
        "padding.amax(3, keepdim=True)",
        "tests/fused/test_video_swin.py -k pad_windows",
    ),
    "a-device-waits-for-the-host-in-each-step": Mutation(
        "standalone/training_loop.py",
        "0 if logs or not stats.is_cuda else 1",
        "0",
        "tests/gpu/test_pretended.py -k standalone",
    ),
    "means-of-channels-are-copied-in-each-step": Mutation(
        "standalone/transforms.py",
        "@sized_constant\ndef _of_channels(*values, dtype, device):",
        "def _of_channels(like, *values):\n    device = like.device",
        "tests/gpu/test_pretended.py -k standalone",
    ),
    "windows-are-summed-one-by-one-on-a-device": Mutation(
        "windows.py",
        "if is_cpu(grid):",
        "if True:",
        "tests/gpu/test_launches.py -k windows",
    ),
    "a-graph-reads-a-flag-that-is-freed": Mutation(
        "selector_state.py",
        "self._nan_flag.logical_or_(found)",
        "self._nan_flag = self._nan_flag | found",
        "tests/test_selector_state.py -k stays_where",
    ),
    "a-cuda-graph-takes-no-memory": Mutation(
        "tools/bench/command.py",
        "step = functools.partial(capture, step)",
        "step = capture(step)",
        "tests/tools/bench/test_command.py -k capture",
    ),
    "a-study-resumes-with-another-recipe": Mutation(
        "tools/study/command.py",
        'f"{row.name}-{key}"',
        "row.name",
        "tests/tools/study/test_command.py -k another_recipe",
    ),
    "a-study-truncates-a-larger-model": Mutation(
        "tools/study/rows.py",
        'validate_checkpoint(model, checkpoint, cfg, "finetune", path)',
        "pass",
        "tests/tools/study/test_command.py -k mistakes",
    ),
    "a-changed-file-comes-from-the-cache": Mutation(
        "video/frame_cache.py",
        "stat_key(path) if _cache.limit",
        "(path,) if _cache.limit",
        "tests/video/test_frame_cache.py -k changed",
    ),
    "a-cache-exceeds-its-limit": Mutation(
        "video/lru_cache.py",
        "while self.size > self.limit and",
        "while not self.limit and",
        "tests/video/test_reader.py -k bounded",
    ),
    "mixup-pairs-neighbours": Mutation(
        "standalone/mixup.py",
        "clips.flip(0).mul_(1.0 - share)",
        "clips.roll(1, 0).mul_(1.0 - share)",
        "tests/standalone/test_mixup.py -k slowfasts",
    ),
    "non-finite-outputs-pass": Mutation(
        "standalone/predictions.py",
        "if is_broken:",
        "if False:",
        "tests/standalone/test_evaluator.py -k not_finite",
    ),
    "a-study-ignores-unreadable-videos": Mutation(
        "tools/study/evaluate.py",
        "self.loader.bad.require_all(self.allow_missing)",
        "pass",
        "tests/tools/study/test_command.py -k unreadable",
    ),
    "adapt-teaches-another-class": Mutation(
        "adaptation.py",
        "F.cross_entropy(found.logits, target.logits.argmax(dim=1))",
        "F.cross_entropy(found.logits, target.logits.argmin(dim=1))",
        "tests/test_adaptation.py -k predicted_class",
    ),
    "adapt-changes-the-backbone-unasked": Mutation(
        "adaptation.py",
        "self.backbone = others if backbone else []",
        "self.backbone = others",
        "tests/test_adaptation.py -k only_scorers",
    ),
    "cosines-are-not-centred": Mutation(
        "fidelity.py",
        "mean = reference.mean(dim=0)",
        "mean = 0.0",
        "tests/test_fidelity.py -k named",
    ),
    "value-ranges-are-not-checked": Mutation(
        "standalone/config.py",
        "check_ranges(cfg, _RANGES)",
        "pass",
        "tests/standalone/test_value_ranges.py -k by_its_keys_name",
    ),
    "a-study-decodes-again": Mutation(
        "tools/study/command.py",
        "with progress, quiet_logs(), cache_frames(size):",
        "with progress, quiet_logs():",
        "tests/tools/study/test_command.py -k once",
    ),
    "no-budget-annealing": Mutation(
        "annealing.py",
        "(sample, budget_widening(fraction, selector.shrink, seed, intermediate))",
        "(sample)",
        "tests/test_schedule.py -k shrink",
    ),
    "annealed-budgets-are-not-sampled": Mutation(
        "annealing.py",
        ".randint(0, upper)",
        ".randint(upper, upper)",
        "tests/test_schedule.py -k shrink",
    ),
    "saliency-is-not-normalised": Mutation(
        "saliency.py",
        "shares / total",
        "shares",
        "tests/test_saliency.py -k cross_entropy",
    ),
    "saliency-loss-is-not-scaled": Mutation(
        "saliency.py",
        "grad * saliency.sum(dim=(1, 2, 3)).mean()",
        "grad",
        "tests/test_saliency.py -k scaled",
    ),
    "saliency-loss-reaches-the-backbone": Mutation(
        "selectors.py",
        "return grid.detach() if self.training and not self.soft else grid",
        "return grid",
        "tests/test_saliency.py -k backbone_learns",
    ),
    "saliency-uses-dropped-tokens": Mutation(
        "selectors.py",
        'self.teacher != "mixture" and self.widening == KEEP_SCALE',
        'self.teacher != "mixture"',
        "tests/test_saliency.py -k taught_when",
    ),
    "no-saliency-loss-while-frozen": Mutation(
        "schedule.py",
        'if self._is_in_freeze() and any(group.get("held_back") for group in groups):',
        "if False:",
        "tests/test_saliency.py -k frozen",
    ),
    "static-graph-of-ddp-thaws-without-reduction": Mutation(
        "frozen_gradients.py",
        "if ddp.static_graph:",
        "if False:",
        "tests/test_frozen_gradients.py -k ddp",
    ),
    "a-lost-freeze-leaves-ddp-frozen": Mutation(
        "frozen_gradients.py",
        "FrozenGradients(model).turn_off([])",
        "FrozenGradients(model).turn_on()",
        "tests/test_frozen_gradients.py -k ddp",
    ),
    "scorers-in-evaluation-go-unseen": Mutation(
        "schedule.py",
        "self._check_gradients()",
        "pass",
        "tests/test_annealing.py -k evaluation",
    ),
    "tokens-that-all-pass-cannot-change-in-place": Mutation(
        "token_selector.py",
        "grid.clone() if self.training",
        "grid if self.training",
        "tests/test_token_selector.py -k in_place",
    ),
    "new-timesformer-ignores-time": Mutation(
        "backbones/timesformer.py",
        "self.time_embed.data.copy_(times)",
        "pass",
        "tests/backbones/test_timesformer.py -k reverse",
    ),
    "new-timesformer-of-one-width": Mutation(
        "backbones/vit.py",
        "nn.init.xavier_uniform_(module.weight)",
        "nn.init.trunc_normal_(module.weight, std=0.02)",
        "tests/backbones/test_timesformer.py -k any_width",
    ),
    "the-loops-learning-rate-is-lost": Mutation(
        "schedule.py",
        'for group, lr, _rate in self._rates:\n            group["lr"] = lr',
        "for group, lr, _rate in self._rates:\n            pass",
        "tests/test_schedule.py -k scheduler_of_pytorchs",
    ),
    "ties-take-the-higher-index": Mutation(
        "topk.py",
        "order = scores.sort(dim=1, descending=True, stable=True).indices",
        "order = -1 - scores.flip(1).sort(dim=1, descending=True, stable=True).indices\n"
        "    order = order % scores.shape[1]",
        f"{TOPK} -k lower_index",
    ),
    "a-new-head-is-frozen": Mutation(
        "optimizer_groups.py",
        "yield from inside.keys() - loaded",
        "yield from ()",
        "tests/test_optimizer_groups.py -k other_classes",
    ),
    "a-partial-load-passes": Mutation(
        "checkpoints/formats.py",
        "if strict and not all(",
        "if not strict and not all(",
        "tests/checkpoints/test_hf_folder.py -k in_part",
    ),
    "annealed-windows-ignore-the-stride": Mutation(
        "selectors.py",
        "self.size_multiple = max(stride, 1)",
        "self.size_multiple = 1",
        "tests/test_schedule.py -k shrink",
    ),
    "seed-without-epoch": Mutation(
        "standalone/training_loop.py",
        "iteration_seed(self.cfg.RNG_SEED, epoch, iteration, self.fabric.global_rank)",
        "iteration_seed(self.cfg.RNG_SEED, iteration, self.fabric.global_rank)",
        f"{ENGINE} -k own_seed",
    ),
    "seed-without-rank": Mutation(
        "standalone/training_loop.py",
        "iteration_seed(self.cfg.RNG_SEED, epoch, iteration, self.fabric.global_rank)",
        "iteration_seed(self.cfg.RNG_SEED, epoch, iteration)",
        f"{PROCESSES} -k draw_apart",
    ),
    "evaluation-in-autocast": Mutation(
        "evaluation.py",
        "stack.enter_context(torch.autocast(device, enabled=False))",
        "stack.enter_context(torch.autocast(device, torch.bfloat16))",
        f"{ENGINE} -k leave_autocast",
    ),
    "fp16-allreduce-ignored": Mutation(
        "standalone/training_loop.py",
        "if cfg.MODEL.FP16_ALLREDUCE and fabric.world_size > 1:",
        "if False:",
        f"{PROCESSES} -k draw_apart",
    ),
    "no-processes-are-started": Mutation(
        "standalone/launch.py",
        "            child.start()",
        "            pass",
        f"{PROCESSES} -k by_spawn",
    ),
    "unreadable-videos-of-one-process-only": Mutation(
        "video/error_log.py",
        "if not torch.distributed.is_initialized():",
        "if True:",
        f"{PROCESSES} -k same_unreadable",
    ),
    "a-test-prefers-the-initial-weights": Mutation(
        "standalone/checkpointing.py",
        "path, checkpoint = cfg.TEST.CHECKPOINT_FILE_PATH, None",
        "path = cfg.TEST.CHECKPOINT_FILE_PATH or cfg.TRAIN.CHECKPOINT_FILE_PATH; checkpoint = None",
        f"{ENGINE} -k prefers",
    ),
    "training-without-shuffling": Mutation(
        "standalone/data.py",
        "cfg.RNG_SEED if train else None)",
        "None)",
        f"{ENGINE} -k shuffles",
    ),
    "validation-clips-change": Mutation(
        "standalone/training_loop.py",
        "self.val_loader.set_epoch(epoch)",
        "self.val_loader.set_epoch(int(time.time()))",
        f"{ENGINE} -k same_clips",
    ),
    "a-resumed-epoch-starts-over": Mutation(
        "standalone/training_loop.py",
        "self.train_loader.skip(first)",
        "pass",
        f"{STOPS} -k loses_no_iteration",
    ),
    "workers-outlive-their-run": Mutation(
        "standalone/signals.py",
        "ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)",
        "pass",
        f"{STOPS} -k still_imports",
    ),
    "workers-end-by-the-groups-signal": Mutation(
        "standalone/data.py",
        "worker_init_fn=worker_init,",
        "",
        f"{STOPS}::test_a_signal_to_the_whole_group_loses_no_iteration[1-15]",
    ),
    "late-signals-are-lost": Mutation(
        "standalone/signals.py",
        "threading.Thread(target=self._end, args=(number[0],), daemon=True).start()",
        "return",
        f"{STOPS} -k print_nothing",
    ),
    "a-process-that-ignores-signals-stays": Mutation(
        "standalone/signals.py",
        "        if not over:",
        "        if False:",
        f"{STOPS} -k reads_no_signal",
    ),
    "a-rank-waits-with-nothing-to-save": Mutation(
        "standalone/signals.py",
        "if not over and self.deferred:",
        "if not over:",
        f"{STOPS} -k reads_no_signal",
    ),
    "a-hung-read-blocks-a-signal": Mutation(
        "standalone/signals.py",
        "        if not over:",
        "        if False:",
        f"{STOPS} -k read_that_hangs",
    ),
    "imports-before-signal-handling": Mutation(
        "standalone/signals.py",
        "    die_with_parent(parent)\n    signal.signal(signal.SIGINT, signal.SIG_DFL)\n",
        "    threading.Timer(60, die_with_parent, (parent,)).start()\n",
        f"{STOPS} -k still_imports",
    ),
    "the-rendezvous-port-is-released": Mutation(
        "standalone/cluster.py",
        "        process.port = store.port\n    return store",
        "        process.port = store.port\n    return None",
        "tests/standalone/test_cluster.py -k gpus_have",
    ),
    "a-killed-worker-is-a-bug-report": Mutation(
        "tools/cli.py",
        "missing_dependency_error(error) or worker_death_error(error) or error",
        "missing_dependency_error(error) or error",
        "tests/tools/test_cli.py -k killed_reader",
    ),
    "a-killed-worker-is-hidden-by-another-error": Mutation(
        "standalone/signals.py",
        "return error.__context__ and worker_death_error(error.__context__)",
        "return None",
        f"{STOPS} -k lost_worker",
    ),
    "signals-lost-while-processes-start": Mutation(
        "standalone/launch.py",
        "if (lost or signals.number) and not terminated:",
        "if lost and not terminated:",
        f"{STOPS} -k reaches_them",
    ),
    "orphans-continue": Mutation(
        "standalone/signals.py",
        "if parent is not None and os.getppid() != parent:",
        "if False:",
        f"{STOPS} -k gone_already",
    ),
    "signals-interrupt-the-cleanup": Mutation(
        "standalone/launch.py",
        "signals.deferred = True  # no signal",
        "pass  # no signal",
        f"{STOPS} -k very_end",
    ),
    "two-runs-in-a-folder": Mutation(
        "standalone/launch.py",
        "            stack.enter_context(lock)\n",
        "            pass\n",
        f"{STOPS} -k second_run",
    ),
    "the-smallest-sigma-is-large": Mutation(
        "topk.py",
        "SMALLEST_SIGMA = 1e-4",
        "SMALLEST_SIGMA = 0.04",
        f"{TOPK} -k wherever_noise",
    ),
    "sums-in-the-order-of-threads": Mutation(
        "topk.py",
        "torch.zeros_like(noise).scatter_(2, columns, marked).mul_(noise).sum(dim=1)",
        "torch.zeros_like(noise[:, 0]).scatter_add_(1, columns.flatten(1), "
        "(marked * noise.gather(2, columns)).flatten(1))",
        f"{TOPK} -k order_of_threads",
    ),
    "the-nan-check-is-inverted": Mutation(
        "selector_state.py",
        "found = scores.detach().isnan().any()",
        "found = ~scores.detach().isnan().any()",
        "tests/test_selectors.py -k on_a_device",
    ),
    "a-device-is-taken-for-the-cpu": Mutation(
        "topk.py",
        'return tensor.device.type == "cpu"',
        'return tensor.device.type != "cpu"',
        "tests/test_selectors.py -k nan_scores",
    ),
    "a-freeze-discards-all-graphs": Mutation(
        "frozen_gradients.py",
        "            _make_room_for_graphs()\n",
        "            torch.compiler.reset()\n",
        "tests/test_frozen_gradients.py -k room",
    ),
    "spread-tokens-come-from-the-host": Mutation(
        "token_scorers.py",
        "space, time = spread_order(height, width, device), spread_order(1, frames, device)",
        "space, time = (spread_order(*hw).to(device) for hw in ((height, width), (1, frames)))",
        "tests/gpu/test_pretended.py -k tokens-uniform",
    ),
    "bench-does-not-cast-weights": Mutation(
        "tools/bench/command.py",
        'if args.cast_weights and mode == "eval":\n            for',
        'if mode == "train":\n            for',
        "tests/tools/bench/test_command.py -k cast_once",
    ),
    "the-grid-is-not-passed-on": Mutation(
        "block_hooks.py",
        "return None if self.last else marked",
        "return None",
        "tests/test_hooks.py -k travels",
    ),
    "recomputed-blocks-take-the-last-grid": Mutation(
        "call_context.py",
        "return number, storage._cdata, x.storage_offset(), tuple(x.shape)",
        "return number, tuple(x.shape)",
        "tests/test_call_context.py -k their_own_call",
    ),
    "masks-of-other-frames": Mutation(
        "hosts/token_sequence.py",
        "entries = entries.repeat_interleave(frames) * all_frames + first",
        "entries = entries.repeat_interleave(frames) * all_frames",
        "tests/hosts/test_masks.py -k is_selected_with_its_frame",
    ),
    "rotary-positions-of-the-first-patches": Mutation(
        "hosts/timm_eva.py",
        "indices[:, self.prefix :] - self.prefix",
        "(indices * 0 + indices[:1])[:, self.prefix :] - self.prefix",
        "tests/hosts/test_timm_eva.py -k positions",
    ),
    "packed-frames-attend-to-one-another": Mutation(
        "hosts/qwen_vision.py",
        "ends = torch.tensor([0, *lengths], device=device).cumsum(0)",
        "ends = torch.tensor([0, sum(lengths)], device=device).cumsum(0)",
        "tests/hosts/test_qwen_vision.py -k is_computed_as_alone",
    ),
    "time-embeddings-of-the-first-frames": Mutation(
        "hosts/videoprism.py",
        "frames = self.model.stts.calls.open_call().grid.frames",
        "frames = self.model.stts.calls.open_call().grid.frames.argsort(1)",
        "tests/hosts/test_videoprism.py",
    ),
    "failed-patches-pass": Mutation(
        "pyslowfast/preflight.py",
        "if failed := autoload.failed_hooks():",
        "if failed := []:",
        f"{GUARD} -k does_not_run",
    ),
    "missing-selectors-pass": Mutation(
        "pyslowfast/preflight.py",
        "if sorted(found) == sorted(wanted) and len(holders) <= 1:",
        "if True:",
        f"{GUARD} -k past_the_registry",
    ),
    "loaded-weights-are-not-checked": Mutation(
        "pyslowfast/checkpoint_loading.py",
        "load.check_read(checkpoint_sd)",
        "load.was_read = True",
        "tests/pyslowfast/test_checkpoint_loading.py -k old_files",
    ),
    "scorers-without-weights-are-tested": Mutation(
        "pyslowfast/checkpoint_loading.py",
        'if random and self.purpose != "finetune":',
        "if False:",
        "tests/pyslowfast/test_checkpoint_loading.py -k got_no_weights",
    ),
    "no-dry-run": Mutation(
        "pyslowfast/plugin.py",
        "if grids is None:",
        "if False:",
        "tests/slowfast/test_wrappers.py -k own_models",
    ),
    "processes-of-torchrun-run-separately": Mutation(
        "pyslowfast/distributed.py",
        "if uses_stts and process:",
        "if False:",
        "tests/pyslowfast/test_distributed.py -k otherwise_than_torchrun",
    ),
    "published-for-another-dataset": Mutation(
        "tools/bench/published.py",
        "results = TABLE.get(_name(config), {}).get(dataset, [])",
        "results = next(iter(TABLE.get(_name(config), {}).values()), [])",
        "tests/tools/bench/test_command.py -k very_config_and_dataset",
    ),
    "missing-config-nodes-pass": Mutation(
        "pyslowfast/config.py",
        "if missing := [name for name in read if name not in self]:",
        "if missing := []:",
        f"{GUARD} -k does_not_run",
    ),
    "noise-without-rank": Mutation(
        "pyslowfast/training.py",
        "if distributed.rank():",
        "if False:",
        "tests/slowfast/test_distributed.py -k noise_is_not",
    ),
    "unreadable-videos-are-scored": Mutation(
        "pyslowfast/error_log.py",
        "return frames, UNREAD_LABEL, *rest",
        "return item",
        f"{BAD} -k is_marked",
    ),
    "only-the-last-view-is-unreadable": Mutation(
        "pyslowfast/error_log.py",
        "meter.video_labels[videos[missing]] = UNREADABLE",
        "missing = missing & (labels == UNREAD_LABEL)",
        f"{BAD} -k unreadable_in_a_view",
    ),
    "configs-of-slowfast-alone-fail": Mutation(
        "pyslowfast/config_access.py",
        'return bool(get_value(cfg, "STTS.ENABLE", False))',
        'return "STTS" in cfg and cfg.STTS.ENABLE',
        "tests/slowfast/test_control.py",
    ),
    "unreadable-videos-allowed": Mutation(
        "pyslowfast/error_log.py",
        'not extra_key(errors.cfg, "TEST.ALLOW_MISSING"):',
        "False:",
        f"{BAD} -k both_accuracies",
    ),
    "no-read-timeout-in-slowfast": Mutation(
        "pyslowfast/error_log.py",
        'run_with_timeout(extra_key(cfg, "DATA.READ_TIMEOUT"), context.path, call)',
        "call()",
        f"{BAD} -k hung_file",
    ),
    "damage-is-not-logged": Mutation(
        "pyslowfast/decoder.py",
        "    if video.damage and context:",
        "    if False:",
        f"{BAD} -k damage_is_written",
    ),
    "normalised-clips-with-channels-first": Mutation(
        "pyslowfast/lazy_clip.py",
        "return operand.shape == (3,) and self.order[-1] == 3",
        "return operand.shape == (3,)",
        f"{CLIPS} -k channels_come_last",
    ),
    "lazy-clips-drop-an-operation": Mutation(
        "pyslowfast/lazy_clip.py",
        "(*steps, (_IN_PLACE[function], rest[0]))",
        "((_IN_PLACE[function], rest[0]),)",
        f"{CLIPS} -k a_crop",
    ),
    "a-process-count-is-pickled-as-an-int": Mutation(
        "pyslowfast/distributed.py",
        "return ForcedMultiProcessCount, (self.given, int(self))",
        "return int, (self.given,)",
        "tests/pyslowfast/test_distributed.py -k forced_process_count",
    ),
    "crops-before-non-local-operations": Mutation(
        "video/image_ops.py",
        "if box and last_nonlocal < 0:",
        "if box:",
        "tests/standalone/test_transforms.py -k part_of_an_augmented",
    ),
    "numeric-parameter-names-fail": Mutation(
        "standalone/checkpointing.py",
        "if isinstance(n, str) else n: state[n]",
        "if True else n: state[n]",
        f"{STOPS} -k names_that_are_numbers",
    ),
    "missing-scorers-pass": Mutation(
        "checkpoints/validate.py",
        "missing = [dimension for dimension in DIMENSIONS",
        "missing = [dimension for dimension in ()",
        f"{CHECK} -k lacks_stop",
    ),
    "a-larger-models-checkpoint-passes": Mutation(
        "checkpoints/validate.py",
        "beyond = [key for key in found if _BLOCK.match(key) and key not in own]",
        "beyond = []",
        f"{CHECK} -k larger",
    ),
    "weights-are-not-validated": Mutation(
        "standalone/checkpointing.py",
        "    validate_checkpoint(model, checkpoint, cfg, purpose, path)\n",
        "",
        f"{CHECK} -k runner_looks",
    ),
    "claimed-keyframes-are-trusted": Mutation(
        "video/frame_index.py",
        "if (packet.is_keyframe and not picture.entry) or",
        "if",
        "tests/video/test_exact_frames.py -k nostss",
    ),
    "not-coded-pictures-are-frames": Mutation(
        "video/bitstream.py",
        "if kind == 2 or not bits.u(1):",
        "if kind == 2:",
        "tests/video/test_exact_frames.py -k nvop",
    ),
    "claimed-times-are-trusted": Mutation(
        "video/frame_index.py",
        "(np.diff(orders[order]) > 0).all() and",
        "",
        "tests/video/test_exact_frames.py -k times_of_decoding",
    ),
    "seeks-are-not-verified": Mutation(
        "video/exact_index.py",
        "or checksum(frame) != index.checksums[number])",
        ")",
        "tests/video/test_exact_frames.py -k other_pixels",
    ),
    "clips-begin-between-two-frames": Mutation(
        "video/sampling.py",
        "if num_video_frames > num_frames * sampling_rate:",
        "if not num_video_frames:",
        "tests/video/test_sampling.py",
    ),
    "cut-transport-streams-pass": Mutation(
        "video/truncation.py",
        'return b"GGG" not in ends',
        "return False",
        "tests/video/test_reader.py -k end_early",
    ),
    "checksums-are-not-verified": Mutation(
        "checkpoints/io.py",
        "return archive.testzip()",
        "return None",
        f"{FILES} -k flipped_byte",
    ),
    "links-are-replaced": Mutation(
        "checkpoints/io.py",
        "    path = os.path.realpath(path)\n    folder =",
        "    folder =",
        f"{FILES} -k links_are_followed",
    ),
    "any-share-of-unreadable-videos": Mutation(
        "standalone/data.py",
        "limit = self.cfg.DATA.MAX_BAD_SHARE",
        "limit = 1.0",
        "tests/standalone/test_data.py -k continues_up_to_the_share",
    ),
    "duplicate-keys-pass": Mutation(
        "configfiles/files.py",
        "if groups or name.startswith(OURS):",
        "if False:",
        "tests/test_properties.py -k given_twice",
    ),
    "a-corrupt-checkpoint-stops-the-run": Mutation(
        "standalone/checkpointing.py",
        "            if strict:",
        "            if True:",
        f"{STOPS} -k corrupt",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows (default: all of them)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    args = parser.parse_args()
    if unknown := set(args.names) - set(MUTATIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --list names them")
    if args.list:
        print("\n".join(MUTATIONS))
        return 0
    failed = []
    for name in args.names or MUTATIONS:
        start = time.perf_counter()
        verdict = judge(MUTATIONS[name])
        print(f"{name}: {verdict} ({time.perf_counter() - start:.0f} s)", flush=True)
        if not verdict.startswith(("red", "skipped")):
            failed.append(name)
    return int(bool(failed))


def judge(mutation: Mutation) -> str:
    """``red`` and the reason if the tests fail; otherwise what happened instead."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("pyproject.toml", "setup.cfg", "README.md"):
            shutil.copy(ROOT / name, tree)
        ignore = shutil.ignore_patterns("__pycache__")
        for name in (PACKAGE, "tests", "configs", "projects"):
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        path = tree / PACKAGE / mutation.file
        source = path.read_text()
        if (count := source.count(mutation.line)) != 1:
            return f"its line occurs {count} times in {mutation.file}"
        path.write_text(source.replace(mutation.line, mutation.replacement))
        words = [*mutation.tests.split(), "-x", "-p", "no:cacheprovider"]
        try:
            tests = subprocess.run(
                [sys.executable, "-m", "pytest", *words],
                cwd=tree,
                env={**os.environ, "PYTHONPATH": str(tree)},
                capture_output=True,
                text=True,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return f"no result after {TIME_LIMIT:g} s"
    if tests.returncode == 1:
        reasons = [line for line in tests.stdout.splitlines() if line.startswith("E  ")]
        return f"red, {' '.join(reasons[0].split())[:200]}" if reasons else "red"
    if tests.returncode == 0 and " passed" not in tests.stdout:
        return "skipped, because these tests need SlowFast"
    return "GREEN" if tests.returncode == 0 else f"no tests ran: {tests.stdout[-300:]}"


if __name__ == "__main__":
    sys.exit(main())
