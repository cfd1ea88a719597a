"""The perturbed Top-K operator beside a plain formulation with one-hot tensors: time and memory.

    OMP_NUM_THREADS=1 python projects/stts/benchmarks/topk.py [--json FILE]

A shape is B,d,k,n: rows of scores, scores per row, number kept, perturbations per row. Both
operators take turns; time is the median of their forward and backward passes (core time on a CPU),
memory is their peak, as PyTorch counts it.
"""

import argparse
import statistics
from functools import partial

import torch

from stts_slowfast import perturbed_topk
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.bench.command import machine, peak_memory, timed

SHAPES = ["8,8,4,500", "64,16,1,500", "8,196,98,500"]
SIGMA = 0.05


def one_hot_topk(scores, k, num_samples, sigma=SIGMA):
    """The definition, written with one-hot tensors (B, n, k, d) and differentiated by hand."""
    return _OneHot.apply(scores, k, num_samples, sigma)


class _OneHot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, k, num_samples, sigma):
        batch, d = scores.shape
        noise = torch.randn(batch, num_samples, d, device=scores.device)
        perturbed = scores[:, None] + sigma * noise
        indices = perturbed.topk(k, dim=2).indices.sort(dim=2).values
        one_hot = torch.nn.functional.one_hot(indices, d).float()  # (B, n, k, d)
        ctx.save_for_backward(one_hot, noise)
        ctx.sigma = sigma
        return one_hot.mean(dim=1)

    @staticmethod
    def backward(ctx, grad_output):
        one_hot, noise = ctx.saved_tensors
        weights = torch.einsum("bnkd,bkd->bn", one_hot, grad_output)
        weights = weights - weights.mean(dim=1, keepdim=True)
        return torch.einsum("bn,bnd->bd", weights, noise) / len(noise[0]) / ctx.sigma, *[None] * 3


OPERATORS = {"one-hot": one_hot_topk, "ours": perturbed_topk}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,d,k,n")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", metavar="FILE", help="file to write every number to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(shape, args) for shape in args.shapes]
    if args.json:
        write_json(args.json, machine(args.device) | {"rows": rows})


def measure(shape: str, args: argparse.Namespace) -> dict:
    """Seconds of each pass and peak bytes of one, of both operators."""
    batch, d, k, num_samples = map(int, shape.split(","))
    scores = torch.rand(batch, d, device=args.device, requires_grad=True)
    grad = torch.randn(batch, k, d, device=args.device)
    passes = {
        name: partial(forward_and_backward, operator, scores, k, num_samples, grad)
        for name, operator in OPERATORS.items()
    }
    seconds = {name: [] for name in passes}
    for repeat in range(args.repeats + 1):
        for name, run in passes.items():
            taken = timed(run, args.device, args.device == "cpu")
            if repeat:
                seconds[name].append(taken)
    memory = {name: peak_memory(run, args.device) for name, run in passes.items()}
    medians = {name: f"{1e3 * statistics.median(each):.1f} ms" for name, each in seconds.items()}
    print(shape, medians, memory, flush=True)
    return {"shape": [batch, d, k, num_samples], "seconds": seconds, "memory": memory}


def forward_and_backward(operator, scores, k, num_samples, grad):
    operator(scores, k, num_samples, SIGMA).backward(grad)


if __name__ == "__main__":
    main()
