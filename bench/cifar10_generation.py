"""What priors over a VQ-VAE-2's codes draw, on CIFAR-10 with labels: docs/results/priors.md.

    vqfast train --preset cifar10-vqvae2 --steps 5000 --set train.schedule=cosine --set train.clip_norm=1.0 --out runs/ae
    vqfast train-prior runs/ae --labels --views 1 --channels 64 --set model.head_channels=256 --set model.condition_channels=64 \\
        --set model.condition_layers=2 --steps 1500 --lr 2e-3 --set train.schedule=cosine --set train.warmup=50 --out runs/prior
    python bench/cifar10_generation.py runs/ae runs/prior [--count 1000]
    python bench/cifar10_generation.py --render docs/results/priors_<date>.json

Bits of the priors against the codes' own entropy; FID and improved precision and recall of as many drawn pictures as
test pictures, with and without rejection sampling; the accuracy-diversity curve; a sheet of samples. The classifier
that rejects is trained on reconstructions of training pictures, and a second one, trained on the pictures themselves
from other weights, judges. The Inception weights are fetched by `vqfast data metrics`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
from report import ROOT, machine
from torch import Tensor

from vqfast.data import default_folder
from vqfast.data.draws import permutation
from vqfast.models import float_to_pixels, pixels_to_float
from vqfast.models.perceptual import FeatureStatistics, InceptionFeatures, frechet_distance, precision_recall
from vqfast.models.rejection import (
    CurvePoint,
    PictureClassifier,
    accuracy_diversity_curve,
    class_scores,
    curve_table,
    keep_best,
    plot_curve,
    train_classifier,
)
from vqfast.train.config import config_from, read_json
from vqfast.train.evaluate import restore
from vqfast.train.plots import picture_grid, save_picture
from vqfast.train.priors import find_priors, level_folder
from vqfast.train.report import channels_last
from vqfast.train.runs import last_metrics
from vqfast.train.sources import open_sources

FRACTION = 0.25
_PER_DIM = {"prior": "bits_per_code", "unigram": "unigram"}
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)


def budget(folder: Path) -> dict:
    """Steps, pictures per step and seconds of training of a run."""
    config, last = config_from(read_json(folder / "config.json")), last_metrics(folder)
    return {"steps": last["step"], "batch": config.data.batch_size, "seconds": last["seconds"]}


def bits(prior_folder: Path, shapes: list[list[int]], dims: int) -> list[dict]:
    """Per level, coarsest first: bits per code and per picture dimension, and the training they took."""
    found = []
    for level in reversed(range(len(shapes))):
        folder = level_folder(prior_folder, level)
        judged, codes = read_json(folder / "held_out.json"), shapes[level][0] * shapes[level][1]
        per_dim = {f"{name} per dim": judged[key] * codes / dims for name, key in _PER_DIM.items()}
        found.append({"level": level, "shape": shapes[level], **judged, **per_dim, "training": budget(folder)})
    return found


def batches(model, data, count: int, size: int, seed: int):
    """(pictures, labels) of random training pictures; as the model reconstructs them, unless it is None."""
    for step in range(count):
        order = permutation(len(data), seed, step)[:size]
        rows = torch.from_numpy(order)
        pixels = data.pixels[rows] if model is None else restore(model, data.pixels[rows])[0]
        yield pixels_to_float(pixels), data.labels[rows]


def classifier(model, data, count: int, size: int, seed: int) -> PictureClassifier:
    torch.manual_seed(seed)
    made = PictureClassifier(classes=len(data.classes))
    train_classifier(made, batches(model, data, count, size, seed), learning_rate=2e-3)
    return made


@torch.no_grad()
def accuracy(judge: PictureClassifier, pixels: Tensor, labels: Tensor) -> float:
    parts = [judge(pixels_to_float(part)).argmax(1) for part in pixels.split(250)]
    return (torch.cat(parts) == labels).double().mean().item()


@torch.no_grad()
def draw_pool(model, prior, shapes, labels: Tensor) -> tuple[Tensor, float]:
    """(uint8 pictures, seconds that the codes took)."""
    begin = time.perf_counter()
    levels = prior.sample(len(labels), *shapes[-1], labels=labels, seed=0, batch_size=64)
    seconds = time.perf_counter() - begin
    parts = zip(*(level.split(100) for level in levels))
    return torch.cat([float_to_pixels(model.decode(list(part))) for part in parts]), seconds


def against(real: Tensor, drawn: Tensor) -> dict[str, float]:
    """FID, precision and recall of Inception features [N, 2048]."""
    sides = FeatureStatistics(), FeatureStatistics()
    for side, features in zip(sides, (real, drawn), strict=True):
        side.add(features)
    precision, recall = precision_recall(real, drawn)
    return {"FID": frechet_distance(*sides), "precision": precision, "recall": recall}


def inception(pixels: Tensor, net: InceptionFeatures) -> Tensor:
    return torch.cat([net(pixels_to_float(part)) for part in pixels.split(10)])


def measure(args):
    """Yields (figures, the sheet as a Pillow image): first without what the Inception network says, then with it."""
    model, prior, settings = find_priors(args.model, args.prior)
    config = config_from(read_json(Path(args.model) / "config.json"))
    data = open_sources(config.data, 3)
    train, test, classes = data.train, data.test, settings["classes"]
    if not classes:
        raise SystemExit("the priors have no classes; train them with --labels")
    result = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "machine": machine()}
    result |= {"count": args.count, "autoencoder": budget(Path(args.model))}
    result["bits"] = bits(Path(args.prior), settings["shapes"], test[0].numel())
    per_class = args.count // len(classes)
    labels = torch.arange(len(classes)).repeat_interleave(round(per_class / FRACTION))
    drawn, seconds = draw_pool(model, prior, settings["shapes"], labels)
    result["drawing"] = {"pictures": len(drawn), "seconds": seconds}
    print(f"{len(drawn)} pictures drawn, codes in {seconds:.0f} s", flush=True)
    rejecting, judge = (
        classifier(which, train, args.classifier_steps, 64, seed) for seed, which in ((1, model), (2, None))
    )
    rows = torch.arange(args.count) * len(test) // args.count
    real, restored = test.pixels[rows], restore(model, test.pixels[rows])[0]
    error = ((real.double() - restored.double()) / 255).square().mean()
    result["reconstruction PSNR of the mean error"] = float(-10 * torch.log10(error))
    scores = class_scores(rejecting, pixels_to_float(drawn), labels)
    kept = keep_best(scores, labels, FRACTION)
    plain = torch.cat([(labels == i).nonzero()[:per_class, 0] for i in range(len(classes))])
    result["judge's accuracy"] = {
        "test pictures": accuracy(judge, real, test.labels[rows]),
        "their reconstructions": accuracy(judge, restored, test.labels[rows]),
    }
    result["curve"] = [point._asdict() for point in curve(judge, drawn, labels, scores)]
    shown = [torch.cat([chosen[labels[chosen] == i][:8] for i in range(len(classes))]) for chosen in (plain, kept)]
    samples = sheet(drawn, shown, classes)
    yield result, samples
    if not args.no_fid:
        sets = {
            "training pictures": train.pixels[torch.arange(args.count) * len(train) // args.count],
            "reconstructions of the test pictures": restored,
            "drawn": drawn[plain],
            f"drawn, the best {FRACTION:.0%} kept": drawn[kept],
        }
        yield result | {"against test pictures": compare(real, sets)}, samples


@torch.no_grad()
def curve(judge: PictureClassifier, drawn: Tensor, labels: Tensor, scores: Tensor) -> list[CurvePoint]:
    found, features = zip(*((judge(x).argmax(1), judge.features(x)) for x in pixels_to_float(drawn).split(250)))
    return accuracy_diversity_curve(scores, labels, torch.cat(found) == labels, torch.cat(features), FRACTIONS)


def compare(real: Tensor, sets: dict[str, Tensor]) -> dict[str, dict]:
    net = InceptionFeatures(default_folder("metrics"))
    base, found = inception(real, net), {}
    for name, pixels in sets.items():
        found[name] = against(base, inception(pixels, net))
        print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    return found


def sheet(drawn: Tensor, shown: list[Tensor], classes: list[str]):
    """A row per class: eight drawn pictures, then eight of those that the classifier kept."""
    each = len(shown[0]) // len(classes)
    rows = []
    for i, name in enumerate(classes):
        part = torch.cat([which[i * each : (i + 1) * each] for which in shown])
        rows.append((f"{name}: {each} as drawn, {each} kept by the classifier", channels_last(drawn[part])))
    return picture_grid(rows, columns=2 * each, least=64)


# ---- the page ----

HOW = """\
Made by bench/cifar10_generation.py from a model of {ae[steps]:,} steps of {ae[batch]} pictures and priors of {prior[steps]:,} steps of
{prior[batch]} maps for each level: a short budget, {minutes:.0f} minutes by the clock in all, {ae_minutes:.0f} of them the autoencoder's.
{cpu}, torch {torch}, {threads} thread(s), commit {commit}, {date}; load average {load:.0f} when the measuring began (the clock of
a busy machine says little). Figures in [{file}]({file}).
"""


def render(result: dict, name: str, folder: Path) -> None:
    """Writes priors.md and priors_curve.png."""
    ae, levels = result["autoencoder"], result["bits"]
    seconds = ae["seconds"] + sum(level["training"]["seconds"] for level in levels)
    where = result["machine"]
    how = HOW.format(
        ae=ae, prior=levels[0]["training"], minutes=seconds / 60, ae_minutes=ae["seconds"] / 60, cpu=where["cpu"],
        torch=where["versions"]["torch"], threads=where["threads"], commit=where["commit"], date=result["date"][:10],
        file=name, load=where["load average at the start"][0],
    )  # fmt: skip
    plot_curve([CurvePoint(**point) for point in result["curve"]], folder / "priors_curve.png")
    sections = [
        "# Measured: a VQ-VAE-2 and its priors on CIFAR-10, by class",
        how,
        "## Bits of the codes (held-out pictures)",
        bits_table(levels),
        "## Samples\n\n![samples by class](priors_samples.png)",
        *quality(result),
        "## Rejection: accuracy against diversity",
        curve_note(result),
        curve_table([CurvePoint(**point) for point in result["curve"]]),
        "![accuracy against diversity](priors_curve.png)",
    ]
    (folder / "priors.md").write_text("\n\n".join(section.strip() for section in sections) + "\n")


def bits_table(levels: list[dict]) -> str:
    head = ["level", "codes", "prior, bits per code", "single codes' frequencies", "uniform", "prior, bits/dim", "single, bits/dim"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for level in levels:
        shape = "x".join(map(str, level["shape"]))
        rows.append(
            f"| {level['level']} | {shape} | **{level['bits_per_code']:.3f}** | {level['unigram']:.3f} | {level['uniform']:.0f} |"
            f" {level['prior per dim']:.4f} | {level['unigram per dim']:.4f} |"
        )
    total = [sum(level[key] for level in levels) for key in ("prior per dim", "unigram per dim")]
    return "\n".join([*rows, f"| all | | | | | **{total[0]:.4f}** | {total[1]:.4f} |"])


def quality(result: dict) -> list[str]:
    found = result.get("against test pictures")
    if not found:
        return []
    rows = ["| against as many test pictures | FID | precision | recall |", "|---|---|---|---|"]
    rows += [f"| {name} | {f['FID']:.1f} | {f['precision']:.3f} | {f['recall']:.3f} |" for name, f in found.items()]
    note = (
        f"Inception features of {result['count']:,} pictures on each side. So few bias FID upwards by about the first row's "
        "value, so the numbers compare with each other, not with those of 10,000 or 50,000 pictures. Precision and recall "
        "by three neighbours (Kynkäänniemi et al. 2019)."
    )
    return ["## Quality", note, "\n".join(rows)]


def curve_note(result: dict) -> str:
    judged, drawing = result["judge's accuracy"], result["drawing"]
    return (
        f"{drawing['pictures']:,} pictures, whose codes took {drawing['seconds']:.0f} s to draw. A classifier trained on "
        "reconstructions scores them; a second one, trained on pictures, says how many show their class. That judge is right on "
        f"{100 * judged['test pictures']:.1f} % of test pictures and {100 * judged['their reconstructions']:.1f} % of their "
        "reconstructions."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("prior", nargs="?")
    parser.add_argument("--count", type=int, default=1000, help="drawn pictures that are judged; a pool of 4 times as many")
    parser.add_argument("--classifier-steps", type=int, default=1000)
    parser.add_argument("--no-fid", action="store_true", help="leave out what needs the Inception network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results")
    parser.add_argument("--render", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.render:
        return render(json.loads(args.render.read_text()), args.render.name, args.render.parent)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for result, samples in measure(args):
        save_picture(samples, args.out / "priors_samples.png")
        file = args.out / f"priors_{result['date'][:10]}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        render(result, file.name, args.out)
    print(args.out / "priors.md")


if __name__ == "__main__":
    main()
