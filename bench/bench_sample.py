"""The measured tables of docs/results/sampling.md, in one run of under 8 minutes on a quiet machine.

    python bench/bench_sample.py                 everything, with two threads
    python bench/bench_sample.py --quick         small maps and networks, into a temporary folder: does it run?
    python bench/bench_sample.py --render FILE   the page again, from a run's JSON

Sampling maps of codes with the incremental engine against the ordinary loop, which runs the whole network again for every
position. The loop is timed on some positions and extrapolated; its forward is the fastest of several ordinary ways to call
the same network. Then: what a token costs at other map sizes, pixels against latents, and training throughput. Checked
first, and nothing is printed when it fails: the engine's logits against the network's, its tokens on a whole map at batch
1 against the naive mode's (the same arithmetic, everything recomputed for each position), equal training losses and
gradients.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_masked_conv import check as check_training
from bench_masked_conv import networks, step, timed
from render import number, table
from report import ROOT, machine

from vqfast.models import VQVAE, CodePrior, GatedPixelCNN, PixelSNAIL
from vqfast.models.sampling import canonical_logits, compile_prior, sample_codes
from vqfast.ops import sample as op

CODES = 512


def median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def times_of(call: Callable[[], object], repeats: int) -> float:
    """Median seconds after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)


def priors(quick: bool) -> dict[str, CodePrior]:
    width, depth = (16, 3) if quick else (128, 15)
    gated = GatedPixelCNN(codebook_size=CODES, channels=width, layers=depth)
    blocks = dict(blocks=2, layers=1) if quick else dict(blocks=4, layers=4)
    snail = PixelSNAIL(codebook_size=CODES, channels=width, residual_channels=width, **blocks)
    shape = f"{blocks['blocks']} blocks of {blocks['layers']} layers and attention x {width}"
    return {f"GatedPixelCNN, {depth} layers x {width}": gated, f"PixelSNAIL, {shape}": snail}


# ---- gates ----


@torch.inference_mode()
def check(prior: CodePrior, size: int) -> int:
    """Raises when the engine is wrong; returns how many tokens equal the naive mode's: all of a map."""
    tokens = sample_codes(prior, 1, size, size, seed=1)
    logits, _ = canonical_logits(prior, tokens)
    network = prior(tokens).movedim(1, -1)
    error = (logits - network).abs().max().item()
    if not error < 1e-3 * network.std().item() + 1e-4:
        raise SystemExit(f"RED: logits differ from the network's by {error:.3g}")
    if not torch.equal(sample_codes(prior, 1, size, size, seed=1, mode="naive"), tokens):
        raise SystemExit("RED: tokens differ from the naive mode's")
    return tokens.numel()


# ---- measurements ----


@torch.inference_mode()
def ordinary_forward(prior: CodePrior, batch: int, size: int, repeats: int) -> tuple[float, str]:
    """Seconds of one pass of the whole network, by the fastest of several ordinary ways; and which one."""
    codes, found = torch.zeros(batch, size, size, dtype=torch.int64), []
    for name, layout in (("plain", torch.contiguous_format), ("channels last", torch.channels_last)):
        prior.to(memory_format=layout)
        found.append((times_of(lambda: prior(codes), repeats), name))
    prior.to(memory_format=torch.contiguous_format)
    return min(found)


def evaluated(prior: CodePrior, batch: int, size: int, lookahead: int) -> float:
    """How often the network was evaluated per position: 1, and more where guesses were wrong."""
    program, inputs = compile_prior(prior), prior.spatial_inputs(None, batch, size, size)
    tokens = torch.full((batch, size, size), -1)
    _, count = op.run_program(program.words, program.weights, tokens, lookahead=lookahead, condition=inputs)
    return count / size**2


def measure_sampling(name: str, prior: CodePrior, size: int, batches: tuple[int, ...], repeats: int) -> list[dict]:
    found = []
    for batch in batches:
        passes = 32 if batch == 1 else 3
        forward, way = ordinary_forward(prior, batch, size, min(passes, 4 * repeats))
        for lookahead in sorted({1, max(1, 6 // batch)}):
            draw = lambda: sample_codes(prior, batch, size, size, lookahead=lookahead, batch_size=batch)  # noqa: B023, E731
            seconds = times_of(draw, repeats)
            entry = {"network": name, "size": size, "batch": batch, "lookahead": lookahead, "seconds": seconds}
            entry |= {"forward seconds": forward, "forward": way, "loop seconds": forward * size**2}
            found.append(entry | {"evaluated": evaluated(prior, batch, size, lookahead)})
            print(f"{name}, batch {batch}, lookahead {lookahead}: {seconds:.3f} s, {forward * size**2 / seconds:.0f}x", flush=True)
    return found


def measure_sizes(name: str, prior: CodePrior, sizes: tuple[int, ...], repeats: int) -> list[dict]:
    """Seconds per token at batch 1 without guesses."""
    found = []
    for size in sizes:
        seconds = times_of(lambda: sample_codes(prior, 1, size, size, lookahead=1), repeats)  # noqa: B023
        found.append({"network": name, "size": size, "seconds per token": seconds / size**2})
    return found


@torch.inference_mode()
def measure_pixels(quick: bool, size: int) -> dict:
    """One RGB picture by the gated network over its latents, decoder included, and by the same network over pixels: 256
    values, the three colours of a pixel one after the other in the row.
    """
    latents, side = priors(quick), 4 * size
    prior = next(iter(latents.values()))
    pixels = GatedPixelCNN(codebook_size=256, channels=prior.config.channels, layers=prior.config.layers)
    model = VQVAE(codebook_size=CODES).eval()
    short = times_of(lambda: model.decode(sample_codes(prior, 1, size, size)), 3)
    begin = time.perf_counter()
    sample_codes(pixels, 1, side, 3 * side)
    return {"side": side, "latents": size, "latent seconds": short, "pixel seconds": time.perf_counter() - begin}


def measure_training(quick: bool, repeats: int) -> dict:
    size, batch = (8, 1) if quick else (32, 4)
    codes = torch.randint(CODES, (batch, size, size))
    models = networks()
    check_training(models, codes)
    seconds = {name: timed(lambda: step(name, prior, codes), repeats) for name, prior in models.items()}  # noqa: B023
    return {"size": size, "batch": batch, "seconds": seconds}


def measure(quick: bool, size: int, repeats: int):
    """Yields the growing result after each section, so that a run that is stopped leaves what it has."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    result: dict = {"date": date, "quick": quick, "repeats": repeats, "machine": machine()}
    result |= {"sampling": [], "sizes": [], "tokens checked": {}}

    def finished() -> dict:
        result["machine"]["load average at the end"] = list(os.getloadavg())
        result["seconds"] = round(time.perf_counter() - begin)
        return result

    for name, prior in priors(quick).items():
        prior.eval()
        result["tokens checked"][name] = check(prior, size)
        print(f"{name}: green, {size * size} tokens equal the naive mode's", flush=True)
        result["sampling"] += measure_sampling(name, prior, size, (1, 16), repeats)
        yield finished()
        result["sizes"] += measure_sizes(name, prior, (size // 2, size, 2 * size), 2)
        yield finished()
    result["training"] = measure_training(quick, repeats)
    yield finished()
    result["pixels"] = measure_pixels(quick, size)
    yield finished()


# ---- the page ----

HOW = """\
`python bench/bench_sample.py`, {date}, {seconds} s in all. {cpu}, {threads} threads, CPU level {level}, torch {torch}, commit
{commit}{changed}. Load average {load[0]:.1f} at the start, {load_end[0]:.1f} at the end (the run's own threads count). float32, K = 512,
random weights, medians of {repeats} after a warm-up. Figures in [{file}]({file}).

Gates, passed before anything was timed: the engine's logits match the network's, and on a whole map at batch 1 its tokens
are those of the naive mode, which recomputes everything for each position in the same arithmetic
({checked}).
"""


def render(result: dict, name: str, folder: Path) -> None:
    """Writes sampling.md."""
    where = result["machine"]
    how = HOW.format(
        date=result["date"][:10], seconds=result["seconds"], cpu=where["cpu"], threads=where["threads"], file=name,
        level=where["cpu level"], torch=where["versions"]["torch"], commit=where["commit"], repeats=result["repeats"],
        changed=" with local changes" if where["changed files"] else "", load=where["load average at the start"],
        load_end=where["load average at the end"],
        checked="; ".join(f"{network}: {count:,} tokens" for network, count in result["tokens checked"].items()),
    )  # fmt: skip
    sections = ["# Measured: sampling codes", how, sampling_table(result["sampling"]), sizes_table(result["sizes"])]
    if "pixels" in result:
        sections.append(pixels_note(result["pixels"]))
    if "training" in result:
        sections.append(training_table(result["training"]))
    (folder / "sampling.md").write_text("\n\n".join(section.strip() for section in sections) + "\n")


def sampling_table(found: list[dict]) -> str:
    head = ["", "batch", "ordinary loop", "lookahead", "engine", "per token", "ratio", "evaluations per position"]
    rows = []
    for e in found:
        loop = f"{number(e['loop seconds'])} s ({number(e['forward seconds'] * 1e3)} ms a pass, {e['forward']})"
        token = f"{e['seconds'] / e['size'] ** 2 / e['batch'] * 1e6:.0f} us"
        ratio = f"**{e['loop seconds'] / e['seconds']:.0f}x**"
        name = f"{e['network']}, {e['size']}x{e['size']}"
        engine, often = f"{e['seconds']:.3f} s", f"{e['evaluated']:.2f}"
        rows.append([name, str(e["batch"]), loop, str(e["lookahead"]), engine, token, ratio, often])
    note = "The loop is extrapolated from passes timed in the same run. Lookahead evaluates columns on guesses; the tokens stay."
    return "## A map of codes\n\n" + table(head, rows) + "\n\n" + note


def sizes_table(found: list[dict]) -> str:
    rows = [[e["network"], f"{e['size']}x{e['size']}", f"{e['seconds per token'] * 1e6:.0f} us"] for e in found]
    return "## A token at other map sizes (batch 1, no lookahead)\n\n" + table(["", "map", "per token"], rows)


def pixels_note(e: dict) -> str:
    return (
        f"## Latents against pixels\n\nOne {e['side']}x{e['side']} RGB picture, the same gated network and engine: over its "
        f"{e['latents']}x{e['latents']} latents {e['latent seconds']:.2f} s, decoder included; over its {3 * e['side'] ** 2:,} values "
        f"{e['pixel seconds']:.1f} s: **{e['pixel seconds'] / e['latent seconds']:.0f}x**."
    )


def training_table(e: dict) -> str:
    base = e["seconds"]["full-size masked kernels"]
    rows = [[name, f"{1e3 * seconds:.0f} ms", f"{base / seconds:.2f}x"] for name, seconds in e["seconds"].items()]
    title = f"## A training step of the gated network, batch {e['batch']}, {e['size']}x{e['size']} codes"
    return title + "\n\nEqual losses and gradients, checked first.\n\n" + table(["", "time", "throughput"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="default 5, and 1 with --quick")
    parser.add_argument("--out", type=Path, help="folder; default docs/results, or a temporary one with --quick")
    parser.add_argument("--render", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.render:
        return render(json.loads(args.render.read_text()), args.render.name, args.out or args.render.parent)
    out = args.out or (Path(tempfile.mkdtemp(prefix="vqfast-sampling-")) if args.quick else ROOT / "docs/results")
    torch.set_num_threads(args.threads)
    out.mkdir(parents=True, exist_ok=True)
    for result in measure(args.quick, 8 if args.quick else 32, args.repeats or (1 if args.quick else 5)):
        file = out / f"sampling_{result['date'][:10]}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        render(result, file.name, out)
    print(f"{out / 'sampling.md'}; {result['seconds']} s")


if __name__ == "__main__":
    main()
