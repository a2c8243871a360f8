#!/usr/bin/env python3
"""bench_pytorch.py: tokens a second of PyTorch, eager or compiled, on the work that train_gpt
does, as a yardstick beside it.

work      one step: forward, backward, clipping at a global norm of 1, AdamW on a fixed batch;
          GPT-2 from its definition (weights (in, out), fused qkv, tanh GELU, tied head), sizes as
          `train_gpt --model`. CPU: f32, each number of threads asked for. CUDA, if there is any:
          bf16 by autocast over f32 weights, TF32 for what stays f32.
fair      whatever PyTorch does fastest: attention by F.scaled_dot_product_attention or by plain
          products, AdamW fused or foreach; both of each are timed first and the faster one is
          named; with --compile the model and its loss under torch.compile. Not here: data loading.
figures   the median of the timed steps; a share of the peak that torch.mm reaches (2048^3 on the
          same threads, 8192^3 on a GPU), counting floating-point operations as flops_per_token in
          gpt.cpp does (the causal half of attention's scores).
usage     python3 tests/bench_pytorch.py [--model char gpt2] [--threads 1 2] [--device cuda]
          [--compile] [--warmup N] [--steps N] [--json]
"""

import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F

MODELS = {  # layers, width, heads, context, vocab, batch
    "char": (6, 384, 6, 256, 256, 16),
    "gpt2": (12, 768, 12, 256, 50257, 4),
    # for a GPU; the rows of the vocabulary padded as train_gpt pads them, which a GPU needs
    "gpt2-1024": (12, 768, 12, 1024, 50304, 16),
}


class Gpt2:
    def __init__(self, layers, width, heads, context, vocab, device):
        self.layers, self.width, self.heads = layers, width, heads

        def normal(*shape, std=0.02):
            return (torch.randn(*shape, device=device) * std).requires_grad_()

        def constant(size, value):
            return torch.full((size,), float(value), device=device, requires_grad=True)

        def linear(size_in, size_out, std=0.02):
            return [normal(size_in, size_out, std=std), constant(size_out, 0)]

        self.wte, self.wpe = normal(vocab, width), normal(context, width, std=0.01)
        residual = 0.02 / math.sqrt(2 * layers)
        self.blocks = [
            [
                [constant(width, 1), constant(width, 0)],
                linear(width, 3 * width),
                linear(width, width, residual),
                [constant(width, 1), constant(width, 0)],
                linear(width, 4 * width),
                linear(4 * width, width, residual),
            ]
            for _ in range(layers)
        ]
        self.ln_f = [constant(width, 1), constant(width, 0)]
        self.params = (
            [self.wte, self.wpe] + [p for b in self.blocks for pair in b for p in pair] + self.ln_f
        )

    def attention(self, q, k, v, fused):  # (B,H,T,D)
        if fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        T = q.shape[2]
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[3])
        return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v

    def loss(self, inputs, targets, fused):
        B, T = inputs.shape
        C = self.width

        def layernorm(x, p):
            return F.layer_norm(x, (C,), p[0], p[1], eps=1e-5)

        def linear(x, p):  # (R,in) (in,out) + (out)
            return torch.addmm(p[1], x.reshape(B * T, -1), p[0]).view(B, T, -1)

        x = F.embedding(inputs, self.wte) + self.wpe[:T]
        for ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj in self.blocks:
            q, k, v = (
                linear(layernorm(x, ln_1), c_attn)
                .view(B, T, 3, self.heads, C // self.heads)
                .permute(2, 0, 3, 1, 4)
            )
            x = x + linear(
                self.attention(q, k, v, fused).transpose(1, 2).reshape(B, T, C), attn_proj
            )
            x = x + linear(F.gelu(linear(layernorm(x, ln_2), c_fc), approximate="tanh"), mlp_proj)
        logits = layernorm(x, self.ln_f).view(B * T, C) @ self.wte.T
        return F.cross_entropy(logits, targets.reshape(-1))


def flops_per_token(layers, width, context, vocab):  # gpt.cpp
    return 6 * (layers * 12 * width * width + vocab * width) + 6 * layers * width * context


def seconds(device, work, times):
    """The seconds of each of `times` calls."""
    measured = []
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - start)
    return measured


def peak(device, dtype):
    """Floating-point operations a second of torch.mm, the best of a few."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(
        n, n, device=device, dtype=dtype
    )
    torch.mm(a, b)
    return 2 * n**3 / min(seconds(device, lambda: torch.mm(a, b), 5))


def faster_attention(gpt, sizes, device, autocast):
    """True when scaled_dot_product_attention beats plain products, forward and backward, at this
    model's sizes."""
    _, width, heads, context, _, batch = sizes
    times = {}
    for fused in (True, False):
        q, k, v = (
            torch.randn(batch, heads, context, width // heads, device=device, requires_grad=True)
            for _ in range(3)
        )

        def work():
            with autocast():
                out = gpt.attention(q, k, v, fused)
            out.sum().backward()

        work()
        times[fused] = min(seconds(device, work, 3))
    return times[True] <= times[False]


def faster_adamw(params, device):
    """The faster of PyTorch's AdamWs, and its name."""
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
    ]
    for p in params:
        p.grad = torch.zeros_like(p)
    best = None
    for name in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, **{name: True})
        optimizer.step()
        took = min(seconds(device, optimizer.step, 2))
        if best is None or took < best[0]:
            best = took, optimizer, name
    return best[1], best[2]


def measure(model, device, threads, warmup, steps, compiled):
    sizes = MODELS[model]
    layers, width, heads, context, vocab, batch = sizes
    torch.manual_seed(1)
    if device == "cpu":
        torch.set_num_threads(threads)
    gpt = Gpt2(layers, width, heads, context, vocab, device)
    tokens = torch.randint(vocab, (batch, context + 1), device=device)
    half = torch.bfloat16 if device == "cuda" else torch.float32

    def autocast():
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    fused = faster_attention(gpt, sizes, device, autocast)
    optimizer, adamw = faster_adamw(gpt.params, device)
    loss_of = torch.compile(gpt.loss, dynamic=False) if compiled else gpt.loss

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = loss_of(tokens[:, :-1], tokens[:, 1:], fused)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.params, 1.0, foreach=True)
        optimizer.step()
        return loss

    seconds(device, step, warmup)
    times = seconds(device, step, steps)
    median, highest = statistics.median(times), peak(device, half)
    rate = batch * context / median
    flops = flops_per_token(layers, width, context, vocab) * rate
    return {
        "pytorch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(half).replace("torch.", ""),
        "threads": threads,
        "compiled": compiled,
        "model": model,
        "batch": batch,
        "context": context,
        "attention": "scaled_dot_product" if fused else "plain",
        "adamw": adamw,
        "steps": steps,
        "step_ms": 1e3 * median,
        "fastest_step_ms": 1e3 * min(times),
        "tokens_per_second": rate,
        "gflops": flops / 1e9,
        "mm_gflops": highest / 1e9,
        "share_of_mm": flops / highest,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["char", "gpt2"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="on the CPU")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        nargs="+",
        default=["cpu"] + ["cuda"] * torch.cuda.is_available(),
    )
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    for device in args.device:
        for model in args.model:
            for threads in args.threads if device == "cpu" else [1]:
                r = measure(model, device, threads, args.warmup, args.steps, args.compile)
                line = (
                    f"pytorch {r['pytorch']} {r['device']} {r['dtype']}, "
                    f"{'compiled' if args.compile else 'eager'}, {r['threads']} threads, {model}: "
                    f"{r['tokens_per_second']:.0f} tokens/s, {r['step_ms']:.0f} ms a step "
                    f"(fastest {r['fastest_step_ms']:.0f}, {r['steps']} steps), "
                    f"{r['gflops']:.1f} GFLOP/s = {100 * r['share_of_mm']:.0f} % of torch.mm's "
                    f"{r['mm_gflops']:.1f}; {r['attention']} attention, {r['adamw']} AdamW"
                )
                print(json.dumps(r) if args.json else line, flush=True)


if __name__ == "__main__":
    main()
