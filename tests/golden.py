#!/usr/bin/env python3
"""golden.py: what PyTorch makes of a very small GPT-2, in double precision, for
tests/test_golden.cpp to compare with.

idea      GPT-2 is written here from its definition (Radford et al., 2019; weights (in, out) as in
          its released code, layernorm before each half of a block, tanh GELU, head tied to the
          token embedding, mean cross-entropy), and PyTorch's autograd and AdamW do the rest.
          Initial weights come from the same generator as fill_random (tensor.h), written again in
          numpy.
file      tests/golden.bin, little-endian, nothing between the parts; P parameters in the order of
          Gpt::params(), R = batch * context:
            i32  magic 0x33444c47, layers, width, heads, context, vocab, batch, steps;   u64 seed
            f64  learning rate, clip limit, weight decay
            i32  tokens (batch, context + 1): inputs are all but the last column, targets all but
                 the first
            f32  initial weights (P)
            f64  logits (R, vocab) before the first step; loss of each step (steps); gradient norm
                 before clipping of each step (steps)
            f64  gradients (P) before the first step, not clipped; weights (P) after all steps,
                 each with the same batch
needs     PyTorch and numpy, only to make the file again: `python3 tests/golden.py`. It also prints
          how far plausible mistakes in the optimizer would move the weights, which must be far
          above the test's 1e-12.
"""

import argparse
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

LAYERS, WIDTH, HEADS, CONTEXT, VOCAB, BATCH, STEPS = 2, 16, 2, 12, 29, 3, 3
SEED = 0x0123456789ABCDEF  # both halves of the key are in use
LR, CLIP, DECAY, BETAS, EPS = 1e-3, 1.0, 0.1, (0.9, 0.95), 1e-8


# ---- initial weights


def philox(counter, key):
    """Philox-4x32-10 of Salmon et al., 2011. counter: four arrays of 32-bit numbers held in uint64;
    key: two numbers."""
    c, k, low = [np.asarray(x, np.uint64) for x in counter], list(key), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        half = np.uint64(32)
        c = [
            (b >> half) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            (a >> half) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def check_philox():
    """The known answers that the authors publish with their library."""
    for counter, key, answer in [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        assert [int(x) for x in philox(counter, key)] == answer


def random_f32(parameter, shape, std):
    """fill_random: the sum of eight 16-bit integers, centred, times one f32 factor."""
    n = math.prod(shape)
    zero = np.zeros(n, np.uint64)
    halves = philox(
        [np.arange(n, dtype=np.uint64), zero, zero + np.uint64(parameter), zero],
        [SEED & 0xFFFFFFFF, SEED >> 32],
    )
    total = sum(
        (v & np.uint64(0xFFFF)).astype(np.int64) + (v >> np.uint64(16)).astype(np.int64)
        for v in halves
    )
    f = np.float32
    scale = f(std) / np.sqrt(f(8) * (f(65536) * f(65536) - f(1)) / f(12))
    return ((total - 4 * 0xFFFF).astype(f) * scale).reshape(shape)


def initial_weights():
    """(name, f32 values), in the order of Gpt::params()."""
    f, C = np.float32, WIDTH
    std, residual = f(0.02), f(0.02) / np.sqrt(f(2) * f(LAYERS))
    normal = {"wte.weight": ((VOCAB, C), std), "wpe.weight": ((CONTEXT, C), f(0.01))}
    constant = {}
    names = ["wte.weight", "wpe.weight"]
    for layer in range(LAYERS):
        h = f"h.{layer}."
        for name, size_in, size_out, deviation in [
            ("ln_1", 0, C, 0),
            ("attn.c_attn", C, 3 * C, std),
            ("attn.c_proj", C, C, residual),
            ("ln_2", 0, C, 0),
            ("mlp.c_fc", C, 4 * C, std),
            ("mlp.c_proj", 4 * C, C, residual),
        ]:
            names += [h + name + ".weight", h + name + ".bias"]
            constant[h + name + ".bias"] = (size_out, 0)
            if size_in:
                normal[h + name + ".weight"] = ((size_in, size_out), deviation)
            else:
                constant[h + name + ".weight"] = (size_out, 1)
    names += ["ln_f.weight", "ln_f.bias"]
    constant["ln_f.weight"], constant["ln_f.bias"] = (C, 1), (C, 0)
    weights = []
    for number, name in enumerate(names):
        if name in normal:
            weights.append((name, random_f32(number, *normal[name])))
        else:
            weights.append((name, np.full(constant[name][0], constant[name][1], f)))
    return weights


def make_tokens():
    """A fixed formula that uses some tokens often and some never."""
    b, t = np.arange(BATCH)[:, None], np.arange(CONTEXT + 1)[None, :]
    return (7 * b * b + 5 * t * t + 3 * b * t + 11) % VOCAB


# ---- the model


def gpt2(w, tokens):
    """Logits (B,T,V) of tokens (B,T)."""
    B, T = tokens.shape
    D = WIDTH // HEADS

    def layernorm(x, name):
        return F.layer_norm(x, (WIDTH,), w[name + ".weight"], w[name + ".bias"], eps=1e-5)

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    past = torch.tril(torch.ones(T, T, dtype=torch.bool))
    for layer in range(LAYERS):
        h = f"h.{layer}."
        qkv = linear(layernorm(x, h + "ln_1"), h + "attn.c_attn")
        q, k, v = (
            part.view(B, T, HEADS, D).transpose(1, 2) for part in qkv.split(WIDTH, dim=2)
        )  # (B,H,T,D)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(D)
        p = scores.masked_fill(~past, -math.inf).softmax(dim=-1)
        x = x + linear((p @ v).transpose(1, 2).reshape(B, T, WIDTH), h + "attn.c_proj")
        x = x + linear(
            F.gelu(linear(layernorm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh"),
            h + "mlp.c_proj",
        )
    return layernorm(x, "ln_f") @ w["wte.weight"].T


def train(
    weights, tokens, clip=CLIP, decay=DECAY, decay_vectors=False, betas=BETAS, eps=EPS, lr=LR
):
    """STEPS steps of AdamW with one batch: logits and gradients before the first, losses and norms
    of each, weights after the last.
    The arguments after `tokens` are the project's own values, or mistakes for `sensitivity` to try.
    """
    w = {
        name: torch.tensor(value.astype(np.float64), requires_grad=True) for name, value in weights
    }
    matrices = [p for p in w.values() if p.dim() > 1]
    vectors = [p for p in w.values() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": decay if decay_vectors else 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    tokens = torch.tensor(tokens)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    first, losses, norms = None, [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = gpt2(w, inputs)
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
        loss.backward()
        gradients = [p.grad for p in w.values()]
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        if first is None:
            first = logits.detach().numpy().copy(), [g.numpy().copy() for g in gradients]
        losses.append(loss.item())
        norms.append(norm)
        factor = (
            min(1.0, clip / norm) if clip else 1.0
        )  # as torch.nn.utils.clip_grad_norm_, without its + 1e-6
        for g in gradients:
            g.mul_(factor)
        optimizer.step()
    return first[0], first[1], losses, norms, [p.detach().numpy().copy() for p in w.values()]


# ---- the file


def sensitivity(weights, tokens, right):
    """How far a mistake moves the weights after all steps, relative to the largest weight."""
    scale = max(np.abs(x).max() for x in right)
    for name, mistake in {
        "no clipping": {"clip": 0},
        "no weight decay": {"decay": 0},
        "decay on vectors too": {"decay_vectors": True},
        "beta2 0.999": {"betas": (0.9, 0.999)},
        "beta1 0.91": {"betas": (0.91, 0.95)},
        "eps 1e-7": {"eps": 1e-7},
        "learning rate 0.1 % off": {"lr": 1.001 * LR},
    }.items():
        wrong = train(weights, tokens, **mistake)[-1]
        print(f"  {name}: {max(np.abs(a - b).max() for a, b in zip(wrong, right)) / scale:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden.bin")
    )
    out = parser.parse_args().out
    torch.set_num_threads(1)
    check_philox()
    weights, tokens = initial_weights(), make_tokens()
    logits, gradients, losses, norms, final = train(weights, tokens)
    with open(out, "wb") as file:

        def put(dtype, *arrays):
            for a in arrays:
                file.write(np.ascontiguousarray(a, dtype).tobytes())

        put("<i4", [0x33444C47, LAYERS, WIDTH, HEADS, CONTEXT, VOCAB, BATCH, STEPS])
        put("<u8", [SEED])
        put("<f8", [LR, CLIP, DECAY])
        put("<i4", tokens)
        put("<f4", *(value for _, value in weights))
        put("<f8", logits, losses, norms, *gradients, *final)
    print(f"{out}: {os.path.getsize(out)} bytes, {sum(v.size for _, v in weights)} parameters")
    print("  losses", losses, "norms", norms)
    print("mistakes would move the weights, relative to the largest, by")
    sensitivity(weights, tokens, final)


if __name__ == "__main__":
    main()
