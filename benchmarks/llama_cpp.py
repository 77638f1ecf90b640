"""Compares Octavo with llama.cpp on this machine: decoding many sequences at once, and one prompt alone.

python -m benchmarks.llama_cpp BATCHED_BENCH FILE.gguf [FILE.gguf ...] [--rounds 5] [--sequences 1,8,32,64]
    [--output 128] [--prefill 512,2048] [--formats native:bfloat16,none:bfloat16] [--threads N]

BATCHED_BENCH is llama.cpp's llama-batched-bench, the files are what it runs, such as one model in BF16 and in Q4_1;
Octavo runs its embedded model in each of `--formats`, quantization:dtype. Both take turns within a round, each in a
process of its own. All sequences have 128 prompt tokens, which Octavo too computes before any decodes (one step takes
them all); decoding is timed from there to the end, a prompt alone up to its first token. Prints medians in tokens a
second, and the ratio of each Octavo format to llama.cpp's best file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

INPUT = 128
"""Prompt tokens of a decoding sequence."""
UBATCH = 512
"""llama.cpp's pieces of a prompt; its default."""

Rates = dict[str, float]
"""Tokens a second by what was measured: "decode 8", "prefill 512"."""


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def llama(
    program: Path, model: Path, sequences: Sequence[int], output: int, prefill: Sequence[int], threads: int
) -> Rates:
    rates: Rates = {}
    runs = [([INPUT], output, list(sequences), "decode"), (list(prefill), 1, [1], "prefill")]
    for prompts, out, parallel, name in runs:
        if not prompts or not parallel:
            continue
        context = max(parallel) * (max(prompts) + out)
        lists = {"-npp": ",".join(map(str, prompts)), "-ntg": str(out), "-npl": ",".join(map(str, parallel))}
        options = {"-m": str(model), "-c": str(context), "-b": "2048", "-ub": str(UBATCH), "-t": str(threads), **lists}
        command = [str(program), *(word for pair in options.items() for word in pair), "--output-format", "jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            if name == "decode":
                rates[f"decode {row['pl']}"] = row["speed_tg"]
            else:
                rates[f"prefill {row['pp']}"] = row["pp"] / row["t_pp"]
    return rates


def octavo(format: str, sequences: Sequence[int], output: int, prefill: Sequence[int]) -> Rates:
    """In this process."""
    from octavo import LLM, SamplingParams
    from octavo.frontend.inputs import TokensPrompt

    quantization, dtype = format.split(":")
    longest = max([INPUT + output + 1, *(n + 1 for n in prefill)])
    llm = LLM(
        quantization=quantization,
        dtype=dtype,
        max_model_len=longest,
        max_num_seqs=max([1, *sequences]),
        max_num_batched_tokens=max([longest, *(n * INPUT for n in sequences)]),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    random_numbers, rates = random.Random(0), Rates()

    def generate(count: int, length: int, out: int) -> tuple[float, float, float]:
        """When it began, when all had a token, and when all had all."""
        vocabulary = llm.config.model.vocab_size
        prompts = [
            TokensPrompt(prompt_token_ids=[random_numbers.randrange(vocabulary) for _ in range(length)])
            for _ in range(count)
        ]
        params = SamplingParams(temperature=0.6, max_tokens=out, ignore_eos=True, detokenize=False)
        began, first = time.time(), 0.0
        for result in llm.generate(prompts, params, use_tqdm=False):
            assert result.metrics is not None
            first = max(first, result.metrics.first_token_time)
        return began, first, time.time()

    with llm:
        llm.warm_up()
        generate(1, 16, 4)
        for count in sequences:
            _, first, end = generate(count, INPUT, output + 1)
            rates[f"decode {count}"] = count * output / (end - first)
        for length in prefill:
            began, first, _ = generate(1, length, 1)
            rates[f"prefill {length}"] = length / (first - began)
    return rates


def octavo_process(format: str, args: argparse.Namespace) -> Rates:
    lists = ["--sequences", args.sequences, "--output", str(args.output), "--prefill", args.prefill]
    command = [sys.executable, "-m", "benchmarks.llama_cpp", *lists, "--octavo", format]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rates: Rates = json.loads(done.stdout.splitlines()[-1])
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("program", nargs="?", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", default="1,8,32,64")
    parser.add_argument("--output", type=int, default=128, help="tokens that each sequence decodes")
    parser.add_argument("--prefill", default="512,2048")
    parser.add_argument("--formats", default="native:bfloat16,none:bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp: the physical cores")
    parser.add_argument("--octavo", metavar="FORMAT", help="measure this alone, in this process, and print JSON")
    args = parser.parse_args()
    sequences, prefill = numbers(args.sequences), numbers(args.prefill)
    if args.octavo:
        print(json.dumps(octavo(args.octavo, sequences, args.output, prefill)))
        return
    if args.program is None or not args.files:
        parser.error("give the path of llama-batched-bench and at least one GGUF file")
    formats = args.formats.split(",")
    rounds: defaultdict[str, list[Rates]] = defaultdict(list)
    for i in range(args.rounds):
        for file in args.files:
            rounds[file.name].append(llama(args.program, file, sequences, args.output, prefill, args.threads))
        for format in formats:
            rounds[format].append(octavo_process(format, args))
        for name, done in rounds.items():
            print(f"round {i + 1} {name:20s}", {key: round(rate, 1) for key, rate in done[-1].items()}, flush=True)
    medians = {name: {key: statistics.median(r[key] for r in done) for key in done[0]} for name, done in rounds.items()}
    print(f"{'medians':16s}" + "".join(f"{name:>24s}" for name in medians))
    for key in medians[formats[0]]:
        best = max(medians[file.name][key] for file in args.files)
        cells = [
            f"{rates[key]:16.1f}" + (f"  x{rates[key] / best:4.2f} " if name in formats else " " * 8)
            for name, rates in medians.items()
        ]
        print(f"{key:16s}" + "".join(cells))


if __name__ == "__main__":
    main()
