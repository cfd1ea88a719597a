"""The perturbed Top-K operator beside a plain formulation with one-hot tensors: time and memory.

    python projects/stts/benchmarks/topk.py --shapes 8,8,4,500 64,16,1,500 8,196,98,500

A shape is B,d,k,n: rows of scores, scores per row, number kept, perturbations per row. Time is
the median of interleaved forward and backward passes; memory is their peak, as PyTorch counts it.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from stts_slowfast import perturbed_topk
from stts_slowfast.tools.bench.command import peak_memory

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,d,k,n")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print("| B, d, k, n | one-hot ms | ours ms | ratio | one-hot MB | ours MB | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for shape in args.shapes:
        batch, d, k, num_samples = map(int, shape.split(","))
        scores = torch.rand(batch, d, device=args.device, requires_grad=True)
        grad = torch.randn(batch, k, d, device=args.device)
        passes = [
            partial(forward_and_backward, operator, scores, k, num_samples, grad)
            for operator in (one_hot_topk, perturbed_topk)
        ]
        times = [[], []]
        for repeat in range(args.repeats + 1):
            for run, seconds in zip(passes, times):
                start = time.perf_counter()
                run()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if repeat:
                    seconds.append(time.perf_counter() - start)
        slow, fast = (statistics.median(seconds) * 1e3 for seconds in times)
        large, small = (peak_memory(run, args.device) / 1e6 for run in passes)
        cells = [f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.1f}"]
        cells += [f"{large:.1f}", f"{small:.1f}", f"{large / small:.1f}"]
        print(f"| {batch}, {d}, {k}, {num_samples} | " + " | ".join(cells) + " |")


def forward_and_backward(operator, scores, k, num_samples, grad):
    operator(scores, k, num_samples, SIGMA).backward(grad)


if __name__ == "__main__":
    main()
