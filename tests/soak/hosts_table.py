"""Tests every host under every execution mode and prints the table of docs/hosts.md.

    PYTHONPATH=. python tests/soak/hosts_table.py [--COLUMN ...] [HOST ...]

A cell is `yes` if the results with selectors are correct, `stock fails` if the stock model fails
too, `-` if not applicable, `not run` if a library is missing, and otherwise the error. Not part of
the test suite; tests/hosts/test_table.py compares hosts and columns.
"""

import os
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from stts_slowfast import attach
from stts_slowfast.hosts import find_blocks
from tests.hosts import examples
from tests.hosts.test_device_and_dtype import quantise
from tests.test_fx_tracing import mvit_v2, swin

SELECTION = {"time": {0: 0.5, 2: 0.5}, "space": {1: 0.6}, "fused_attention": False}
SELECTION |= {"num_samples": 10}


def torchvision(make):
    model, clips, _ = make()
    return examples.Example(model, clips, lambda model, clips: model(clips))


HOSTS = {
    "torchvision MViTv2": lambda: torchvision(mvit_v2),
    "torchvision Video Swin": lambda: torchvision(swin),
    "pytorchvideo MViT": examples.pytorchvideo,
    "VideoMAE": examples.videomae,
    "ViViT": examples.vivit,
    "V-JEPA 2": examples.vjepa2,
    "TimeSformer divided": examples.timesformer,
    "TimeSformer joint": lambda: examples.timesformer("joint_space_time"),
    "TimeSformer space only": lambda: examples.timesformer("space_only"),
    "VideoPrism": examples.videoprism,
    "SigLIP, frame by frame": lambda: examples.hf_frames("Siglip"),
    "CLIP, frame by frame": lambda: examples.hf_frames("CLIP", "VisionModel"),
    "DINOv2, frame by frame": lambda: examples.hf_frames("Dinov2WithRegisters"),
    "DINOv3, frame by frame": lambda: examples.hf_frames(
        "DINOv3ViT", "Model", num_register_tokens=2
    ),
    "timm, frame by frame": examples.timm_frames,
    "timm Eva, frame by frame": lambda: examples.timm_eva(num_reg_tokens=2, rope_type="dinov3"),
    "timm, tubelets": examples.timm_tubelets,
    "research code": lambda: examples.research(examples.PlainBlock),
    "V-JEPA 2, authors' code": lambda: examples.research(examples.RotaryBlock),
}


class Missing(Exception):
    """There is no such thing, or a library is missing."""


def selecting(example, **changes):
    swin_stages = hasattr(example.model, "features")
    plan = {**SELECTION, "time": {0: 0.5}} if swin_stages else SELECTION
    return example._replace(model=attach(example.model, **{**plan, **changes}))


def logits(example):
    return example.logits(example.model, example.clips)


def same(found, expected, tolerance=0.0):
    error = (found - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{error:.1e} off"


def attention(example, name):
    model = example.model
    if hasattr(model, "set_attn_implementation"):
        try:
            model.set_attn_implementation(name)
        except ValueError as error:
            raise Missing("-") from error
        if model.config._attn_implementation != name:
            raise Missing("-")
    elif hasattr(find_blocks(model)[0], "attn") and hasattr(
        find_blocks(model)[0].attn, "fused_attn"
    ):
        for block in find_blocks(model):
            block.attn.fused_attn = name == "sdpa"
    elif name == "sdpa":
        raise Missing("-")  # of its own; STTS.FUSED_ATTENTION brings it
    plain = logits(example)
    whole = {key: dict.fromkeys(SELECTION[key], 1.0) for key in ("time", "space")}
    if hasattr(model, "features"):
        whole["time"] = {0: 1.0}
    same(logits(selecting(example, **whole)), plain)


def eager(example):
    attention(example, "eager")


def sdpa(example):
    attention(example, "sdpa")


def compiled(example):
    expected = logits(selecting(example))
    torch._dynamo.reset()
    model = torch.compile(example.model, fullgraph=True, backend="eager")
    same(logits(example._replace(model=model)), expected, 1e-5)


class Logits(nn.Module):
    def __init__(self, example):
        super().__init__()
        self.model, self.run = example.model, example.logits

    def forward(self, clips):
        return self.run(self.model, clips)


def exported(example):
    expected = logits(selecting(example))
    program = torch.export.export(Logits(example), (example.clips,)).module()
    same(program(example.clips), expected, 1e-5)


def onnx(example):
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Missing("not run") from error
    expected = logits(selecting(example))
    program = torch.onnx.export(Logits(example), (example.clips,), dynamo=True, verbose=False)
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: example.clips.numpy()})
    same(torch.from_numpy(found), expected, 1e-4)


def gradients(example):
    torch.manual_seed(0)
    example.model.zero_grad()
    with torch.enable_grad():
        logits(example).square().mean().backward()
    named = example.model.named_parameters()
    return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in named}


def checkpointing(example):
    selecting(example).model.train()
    plain = gradients(example)
    for block in find_blocks(example.model):
        parent, name = next(
            (parent, name)
            for parent in example.model.modules()
            for name, child in parent.named_children()
            if child is block
        )
        setattr(parent, name, checkpoint_wrapper(block))
    for name, gradient in gradients(example).items():
        assert (gradient is None) == (plain[name] is None), name
        if gradient is not None:
            same(gradient, plain[name])


def lora(example):
    try:
        import peft
    except ImportError as error:
        raise Missing("not run") from error
    inside = {module for block in find_blocks(example.model) for module in block.modules()}
    names = [
        name
        for name, module in example.model.named_modules()
        if isinstance(module, nn.Linear) and module in inside
    ]
    adapted = peft.get_peft_model(example.model, peft.LoraConfig(target_modules=names))
    attach(
        adapted.get_base_model(),
        **(
            SELECTION if not hasattr(example.model, "features") else {**SELECTION, "time": {0: 0.5}}
        ),
    )
    same(example.logits(adapted, example.clips), logits(example))
    with torch.enable_grad():
        example.logits(adapted.train(), example.clips).sum().backward()
    lora = [
        p for name, p in adapted.named_parameters() if "lora_" in name and "predictor" not in name
    ]
    assert lora and any(p.grad is not None for p in lora)


def int8(example):
    for block in find_blocks(example.model):
        quantise(block)
    try:
        logits(example)
    except RuntimeError as error:  # weights are read past their modules
        raise Missing("stock fails") from error
    assert logits(selecting(example)).isfinite().all()
    assert all(p.is_floating_point() for p in example.model.stts.parameters())


def in_group(run):
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
        try:
            run()
        finally:
            dist.destroy_process_group()


def ddp(example):
    selecting(example).model.train()
    plain = gradients(example)

    def run():
        for name, parameter in example.model.named_parameters():
            parameter.requires_grad_(plain[name] is not None)
        model = nn.parallel.DistributedDataParallel(example.model)
        for name, gradient in gradients(example._replace(model=model)).items():
            if gradient is not None:
                same(gradient, plain[name.removeprefix("module.")], 1e-5)

    in_group(run)


def fsdp2(example):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    selecting(example).model.train()
    plain = gradients(example)

    def run():
        mesh = init_device_mesh("cpu", (1,))
        for module in [*find_blocks(example.model), example.model]:
            fully_shard(module, mesh=mesh)
        for name, gradient in gradients(example).items():
            if gradient is not None:
                same(gradient.full_tensor(), plain[name], 1e-5)

    in_group(run)


def sizes(example):
    shape = [48 if side == 32 else side for side in example.clips.shape]
    example = example._replace(clips=torch.randn(shape))
    plain = logits(example)
    whole = {key: dict.fromkeys(SELECTION[key], 1.0) for key in ("time", "space")}
    if hasattr(example.model, "features"):
        whole["time"] = {0: 1.0}
    same(logits(selecting(example, **whole)), plain)


COLUMNS = {
    "eager": eager,
    "SDPA": sdpa,
    "compile": compiled,
    "export": exported,
    "ONNX": onnx,
    "checkpointing": checkpointing,
    "LoRA": lora,
    "int8": int8,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "other sizes": sizes,
}
TRAINING = (checkpointing, ddp, fsdp2)


def cell(make, run) -> str:
    example = make()
    try:
        with torch.set_grad_enabled(run in TRAINING):
            run(example)
        return "yes"
    except Missing as error:
        return str(error)
    except Exception as error:
        if run is sizes and not hasattr(example.model, "stts"):
            return "stock fails"
        return f"{type(error).__name__}: {str(error)[:80]!r}"


def main() -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    columns = [name.removeprefix("--") for name in sys.argv[1:] if name.startswith("--")]
    columns = columns or list(COLUMNS)
    print("| host |", " | ".join(columns), "|")
    print("| --- |", " | ".join("---" for _ in columns), "|")
    for name in [name for name in sys.argv[1:] if not name.startswith("--")] or HOSTS:
        cells = [cell(HOSTS[name], COLUMNS[column]) for column in columns]
        print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
