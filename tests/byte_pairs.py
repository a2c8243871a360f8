#!/usr/bin/env python3
"""Byte pairs against Hugging Face's tokenizers library, only when asked for: needs `tokenizers`.

    make BACKEND=cpu build/cpu/tests/test_support && python3 tests/byte_pairs.py [STRINGS [DIR]]

A byte-level encoding with GPT-2's pattern is read from DIR (GPT-2's own vocab.json and merges.txt,
say), or trained on this project's files, accented letters and random texts. It is saved as
vocab.json and merges.txt and as tokenizer.json, and STRINGS (100,000) mixed strings of all scripts
must have the same tokens there and here, both ways.
"""
import glob
import os
import random
import subprocess
import sys
import tempfile

from tokenizers import ByteLevelBPETokenizer, Tokenizer

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
strings = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
r = random.Random(1)
blocks = [(0x20, 0x7F), (0x80, 0x250), (0x250, 0x600), (0x600, 0xE00), (0xE00, 0x1100),
          (0x1100, 0x2000), (0x2000, 0x2C00), (0x2C00, 0x3400), (0x3400, 0xA000),
          (0xA000, 0xD800), (0xE000, 0x10000), (0x10000, 0x14000), (0x14000, 0x1D000),
          (0x1D000, 0x20000), (0x20000, 0x33000), (0xE0000, 0x110000)]
pieces = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", " ", "  ", "\n", "\t", "\r\n",
          "\u0085", "\u00a0", "\u202f", "\u2007", "\u3000", "\u180e", "\u200b", "\x1c",
          "<|endoftext|>", "<|endof", "the", " of", "1", "23", "\u00bd", "\u00b2",
          "\u0935\u093e", "e\u0301", "...", "\x01"]


def text():
    out = []
    for _ in range(r.randint(1, 24)):
        if r.random() < 0.5:
            out.append(r.choice(pieces))
        else:
            first, end = r.choice(blocks)
            out += [chr(r.randrange(first, end)) for _ in range(r.randint(1, 4))]
    return "".join(out)


texts = [text() for _ in range(strings)]
with tempfile.TemporaryDirectory() as d:
    if len(sys.argv) > 2:
        bpe = ByteLevelBPETokenizer(f"{sys.argv[2]}/vocab.json", f"{sys.argv[2]}/merges.txt")
        bpe.add_special_tokens(["<|endoftext|>"])
    else:
        bpe = ByteLevelBPETokenizer()
        files = sorted(glob.glob("*.cpp") + glob.glob("docs/*.md"))
        accents = ["".join(map(chr, range(0xA1, 0x180))) * 9]
        bpe.train_from_iterator([open(f).read() for f in files] + accents + texts[:2000],
                                vocab_size=2400, min_frequency=2,
                                special_tokens=["<|endoftext|>"])
    os.makedirs(f"{d}/two")
    os.makedirs(f"{d}/one")
    bpe.save_model(f"{d}/two")
    bpe.save(f"{d}/one/tokenizer.json")
    theirs = Tokenizer.from_file(f"{d}/one/tokenizer.json")
    assert [t for t, _ in theirs.pre_tokenizer.pre_tokenize_str("a b")] == ["a", "\u0120b"]
    expected = [e.ids for e in theirs.encode_batch(texts)]
    failed = 0
    for name, label in (("one", "tokenizer.json"), ("two", "vocab.json and merges.txt")):
        command = ["build/cpu/tests/test_support", "encode", f"{d}/{name}"]
        out = subprocess.run(command, check=True, capture_output=True,
                             input="\0".join(texts).encode()).stdout.decode().splitlines()
        ours = [[int(t) for t in line.split()] for line in out]
        assert len(ours) == len(texts), (len(ours), len(texts))
        differ = [i for i in range(strings) if ours[i] != expected[i]]
        failed += len(differ)
        print(f"{'FAIL' if differ else 'ok  '} {label}: {len(differ)} of {strings} strings "
              f"differ, {sum(map(len, ours))} tokens")
        for i in differ[:3]:
            print(ascii(texts[i]), ours[i], expected[i])
sys.exit(failed > 0)
