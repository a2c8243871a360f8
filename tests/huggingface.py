#!/usr/bin/env python3
"""Checkpoints against Hugging Face transformers, only when asked for: needs torch, transformers,
safetensors and tokenizers.

    make build build/cpu/tests/test_checkpoint && python3 tests/huggingface.py

Out: a trained checkpoint, exported, opened by GPT2LMHeadModel; back: a random GPT-2 of theirs,
imported. Logits of both must agree to 1e-4. Byte pairs: a tokenizer trained on this project's
files encodes them as transformers' GPT-2 tokenizer does (build/generate's, seen through its
output).
"""

import glob, json, os, shutil, subprocess, sys, tempfile
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

os.chdir(os.path.join(os.path.dirname(__file__), ".."))
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
failed = 0


def run(*words, **more):
    return subprocess.run(
        [str(w) for w in words], check=True, capture_output=True, text=True, **more
    ).stdout


def check(name, worst, bound=1e-4):
    global failed
    failed += not worst <= bound
    print(f"{'ok  ' if worst <= bound else 'FAIL'} {name}  largest difference {worst:.2g}")


def ours(directory, tokens):
    return torch.tensor(
        [
            float(x)
            for x in run("build/cpu/tests/test_checkpoint", "logits", directory, *tokens).split()
        ],
        dtype=torch.float64,
    )


with tempfile.TemporaryDirectory() as d:
    tokens = [12, 200, 7, 99, 31, 0, 255, 64]
    run(
        os.environ.get("MPIEXEC") or shutil.which("mpiexec.mpich") or "mpiexec",
        "-n",
        4,
        "build/cpu/train_gpt",
        "--fsdp",
        2,
        "--tp",
        2,
        "--steps",
        20,
        "--width",
        96,
        "--layers",
        3,
        "--vocab",
        257,
        "--checkpoint",
        f"{d}/c",
    )
    run("build/cpu/checkpoint", "export", f"{d}/c", f"{d}/out")
    model, report = GPT2LMHeadModel.from_pretrained(f"{d}/out", output_loading_info=True)
    assert not report["unexpected_keys"] and not [
        k for k in report["missing_keys"] if k != "lm_head.weight"
    ], report
    with torch.no_grad():
        theirs = model.double()(torch.tensor([tokens])).logits[0, -1]
    check("hugging_face_opens_what_we_export", (theirs - ours(f"{d}/c", tokens)).abs().max().item())

    # Tokens of byte pairs, and a random model of theirs with that vocabulary.
    files = [f for f in sorted(glob.glob("*.cpp") + glob.glob("docs/*.md"))]
    bpe = ByteLevelBPETokenizer()
    bpe.train(files, vocab_size=601, min_frequency=2, special_tokens=["<|endoftext|>"])
    bpe.save_model(d)
    torch.manual_seed(1)
    random = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=601,
            n_positions=256,
            n_embd=48,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    for name, p in random.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1e-4)):
        random.to(dtype).save_pretrained(f"{d}/hf-{dtype}", safe_serialization=True)
        for name in ("vocab.json", "merges.txt"):
            open(f"{d}/hf-{dtype}/{name}", "w").write(open(f"{d}/{name}").read())
        run("build/cpu/checkpoint", "import", f"{d}/hf-{dtype}", f"{d}/in-{dtype}")
        with torch.no_grad():
            theirs = (
                GPT2LMHeadModel.from_pretrained(f"{d}/hf-{dtype}")
                .double()(torch.tensor([tokens]))
                .logits[0, -1]
            )
        check(
            f"we_import_theirs_in_{str(dtype)[6:]}",
            (theirs - ours(f"{d}/in-{dtype}", tokens)).abs().max().item(),
            bound,
        )

    # What generate prints starts with the prompt, through our encoder and decoder; the greedy
    # continuation depends on the very tokens.
    tokenizer = GPT2Tokenizer(f"{d}/vocab.json", f"{d}/merges.txt")
    texts = [
        "The model's layers don't divide  by 3,\n\n  so we'll pad 1024 rows.",
        "int main() {\n\treturn 0;\n}",
        "naïve café — 数学 ∑ x²",
        "  leading and trailing  ",
        "'tis I'VE 've\r\n",
    ]
    different = 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            out = (
                random.double()
                .generate(
                    torch.tensor([ids]),
                    max_new_tokens=12,
                    do_sample=False,
                    pad_token_id=0,
                    eos_token_id=None,
                )[0]
                .tolist()
            )
        expected = tokenizer.decode(out, clean_up_tokenization_spaces=False)
        got = subprocess.run(
            [
                "build/cpu/generate",
                "--checkpoint",
                f"{d}/in-{torch.bfloat16}",
                "--dtype",
                "f64",
                "--temperature",
                "0",
                "--tokens",
                "12",
                "--prompt-file",
                "-",
            ],
            input=f"{text}\n".encode(),  # generate leaves out the end of the last line
            capture_output=True,
            check=True,
        ).stdout.decode("utf-8", "replace")
        if got != expected + "\n":
            different += 1
            print(repr(got), repr(expected))
    check("byte_pairs_and_greedy_text_are_theirs", different, 0)
sys.exit(failed != 0)
