"""python -m mae_core.checkpoint: what a checkpoint holds and what loading it does; writing it in another form."""

import argparse
import contextlib
import hashlib
import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from mae_core.checkpoint.convert import OURS, PREFIXED
from mae_core.checkpoint.errors import printable
from mae_core.checkpoint.export import TARGETS, check_target, export, left_out, numbers, save_canonical
from mae_core.checkpoint.formats import FORMATS
from mae_core.checkpoint.load import LoadReport, load_classifier, load_encoder, model_of
from mae_core.checkpoint.locate import WEIGHTS
from mae_core.checkpoint.read import Checkpoint, read_checkpoint
from mae_core.command_line import answered
from mae_core.errors import UserError
from mae_core.flags import program
from mae_core.timm_encoder import PREFIX, has_one_grid, is_timm
from mae_core.vit import get_arch, variant_in_words

# Released files by the first digits of their hash: MD5 in facebookresearch/mae (README.md, FINETUNE.md); SHA-256 in the
# file names of facebookresearch/deit and open-mmlab/mmpretrain (configs/mae/metafile.yml).
KNOWN_MD5 = {
    "8cad7c": "mae_pretrain_vit_base.pth, the paper's encoder (1600 epochs, normalised pixels)",
    "b8b06e": "mae_pretrain_vit_large.pth, the paper's encoder (1600 epochs, normalised pixels)",
    "9bdbb0": "mae_pretrain_vit_huge.pth, the paper's encoder (1600 epochs, normalised pixels)",
    "1b25e9": "mae_finetuned_vit_base.pth, a classifier of 83.664 % on ImageNet",
    "51f550": "mae_finetuned_vit_large.pth, a classifier of 85.952 % on ImageNet",
    "2541f2": "mae_finetuned_vit_huge.pth, a classifier of 86.928 % on ImageNet",
}
KNOWN_SHA256 = {
    "a1311bcf": "deit_tiny_patch16_224",
    "cd65a155": "deit_small_patch16_224",
    "b5f2ef4d": "deit_base_patch16_224",
    "8de9b5d1": "deit_base_patch16_384",
    "b40b3cf7": "deit_tiny_distilled_patch16_224",
    "649709d9": "deit_small_distilled_patch16_224",
    "df68dfff": "deit_base_distilled_patch16_224",
    "d0272ac0": "deit_base_distilled_patch16_384",
    "c2cf66ba": "mmselfsup's MAE ViT-B, 300 epochs",
    "bc79e40b": "mmselfsup's MAE ViT-B, 400 epochs",
    "5d81fbc4": "mmselfsup's MAE ViT-B, 800 epochs",
    "f7569ca2": "mmselfsup's MAE ViT-B, 1600 epochs",
    "b11d0425": "mmselfsup's MAE ViT-L, 400 epochs",
    "df72726a": "mmselfsup's MAE ViT-L, 800 epochs",
    "cc7e98c9": "mmselfsup's MAE ViT-L, 1600 epochs",
    "ff848775": "mmselfsup's MAE ViT-H, 1600 epochs",
}


def md5_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def remarks(checkpoint: Checkpoint) -> list[str]:
    """What a user should know about this file: which released one it is, by its hash, or what its contents show."""
    known = KNOWN_SHA256.get(checkpoint.sha256[:8])
    path = Path(checkpoint.path)
    if known is None and path.is_file() and checkpoint.format in ("mae-pretrain", "mae-finetuned"):
        known = KNOWN_MD5.get(md5_of(path)[:6])
    found = [f"this is {known}"] if known else []
    if checkpoint.kind == "classifier":
        found.append("this is a fine-tuned classifier, not a pre-trained encoder")
    if checkpoint.kind == "linear-probe":
        found.append("this is a linear probe over a frozen encoder")
    if path.name.startswith("mae_visualize"):
        found.append("by its name this is the un-normalised visualise model: the paper's numbers are not of it")
    elif checkpoint.format == "mae-full":
        found.append("encoder and decoder; nothing in the file tells whether its target was normalised pixels")
    if checkpoint.format == "deit3":
        found.append("timm's ViTs with rotary positions have the same tensors: one of those would be computed wrongly")
    if checkpoint.format == "hf-vit-mae":
        found.append(
            "transformers converts the un-normalised visualise model by default: facebook/vit-mae-* may not be the "
            "paper's encoders"
        )
    return found


def uses(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint can be used for."""
    head = checkpoint.classifier.get("head.weight")
    found = []
    if checkpoint.kind != "classifier":
        arch = checkpoint.arch
        dense = not is_timm(arch) or has_one_grid(arch.removeprefix(PREFIX))
        found.append(f"fine-tuning, linear probing, k-NN{', detection, segmentation' * dense}")
    if head is not None:
        found.append(f"evaluation as a classifier of {len(head)} classes")
    if checkpoint.decoder:
        found.append("reconstruction")
    return found


def report_of(checkpoint: Checkpoint) -> LoadReport:
    """What loading it does at its arch's own input size; the model takes no memory."""
    with torch.device("meta"):
        if checkpoint.kind != "classifier":
            pool = "token" if "norm.weight" in checkpoint.encoder or is_timm(checkpoint.arch) else "avg"
            return load_encoder(model_of(checkpoint, pool=pool), checkpoint)
        head = checkpoint.classifier.get("head.weight", torch.empty(0))
        model = model_of(checkpoint, get_arch(checkpoint.arch).image_size, len(head), checkpoint.pool)
        return load_classifier(model, checkpoint)


def grouped(names: Iterable[str]) -> list[str]:
    """Names with the blocks' numbers folded: "blocks.*.norm1.weight (12)"."""
    counts: dict[str, int] = {}
    for name in names:
        folded = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
        counts[folded] = counts.get(folded, 0) + 1
    return [f"{name} ({n})" if n > 1 else name for name, n in counts.items()]


def describe(checkpoint: Checkpoint) -> list[str]:
    """The report, line by line."""
    a, c = get_arch(checkpoint.arch), checkpoint
    lines = [("file", c.path)] + [("", remark) for remark in remarks(c)]
    lines += [("format", c.format), ("kind", c.kind), ("use", "; ".join(uses(c)))]
    lines += [("arch", f"{c.arch}: width {a.dim}, {a.depth} blocks, {a.heads} heads, patches of {a.patch} px")]
    lines += [
        ("", variant_in_words(c.variant) or ("plain ViT" if c.plain else "as timm builds it")),
        ("sha256", c.sha256),
    ]
    origin = " (the format's: the file does not say)" if c.format not in ("ours", "random") else ""
    origin = " (said by the config beside it)" if c.config else origin
    lines += [("input", f"{c.meta['image_size']} px, mean {numbers(c.mean)}, std {numbers(c.std)}{origin}")]
    eps = "" if is_timm(c.arch) else f"LayerNorm eps {c.eps:g}, "  # timm's model has its own
    lines += [("", f"{eps}pooling {c.pool}")]
    for part, tensors in (("encoder", c.encoder), ("decoder", c.decoder), ("classifier", c.classifier)):
        if tensors:
            count = sum(tensor.numel() for tensor in tensors.values())
            lines.append((part, f"{len(tensors)} tensors, {count:,} parameters"))
    meta = {name: value for name, value in c.meta.items() if name != "image_size"}
    lines += [("training", " ".join(f"{name}={value}" for name, value in meta.items()))] if meta else []
    report = report_of(c)
    lines += [("load", report.summary())]
    for fate in ("resized", "missing"):
        lines += [(fate if fate != "missing" else "new", name) for name in grouped(getattr(report, fate))]
    dropped = grouped(report.dropped)
    if len(dropped) > 12:  # another model: its name is enough
        dropped = grouped(name.partition(".")[0] + ".*" if "." in name else name for name in report.dropped)
    lines += [("dropped", name) for name in dropped]
    made = {name: " + ".join(c.sources.get(name, ())) for name in report.converted}
    lines += [("converted", line) for line in grouped(f"{name} <- {of}" for name, of in made.items())]
    lines += [("loaded", name) for name in grouped(n for n in report.loaded if n not in made)]
    shown, previous = [], ""
    for label, text in lines:
        shown.append(f"{label if label != previous else '':<11}{text}")
        previous = label or previous
    return shown


def same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # one of them is not there
        return False


def formats() -> list[str]:
    """--formats: every format, in the order in which they are tried."""
    known = (OURS, *FORMATS[:-1], PREFIXED, FORMATS[-1])
    return [f"{f.name:<20}{f.what}; mean {f.normalization[0][0]:g} ..., eps {f.eps:g}, pooling {f.pool}" for f in known]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program("mae_core.checkpoint"), description="Say what a checkpoint holds; write it in another form."
    )
    parser.add_argument(
        "file", nargs="?", help="a checkpoint, a folder with a config, hf:NAME, timm:NAME or random:ARCH"
    )
    parser.add_argument("--key", help="which of several models in the file")
    parser.add_argument("--convert", metavar="OUT", type=Path, help="write the canonical form (safetensors)")
    parser.add_argument(
        "--to", nargs=2, metavar=("FORM", "OUT"), help=f"write it for another project: {', '.join(TARGETS)}"
    )
    parser.add_argument("--formats", action="store_true", help="list the formats that are read")
    args = parser.parse_args(argv)
    if args.file is None and not args.formats:
        parser.error("give a file, or --formats")
    return answered(partial(run, args))


def run(args: argparse.Namespace) -> int:
    if args.formats:
        print("\n".join(formats()), flush=True)
        return 0
    form, to = (args.to[0], Path(args.to[1])) if args.to else ("", None)
    if args.convert and args.convert.suffix != ".safetensors":
        raise UserError(f"{args.convert} will be a safetensors file: let its name end in .safetensors")
    if to:
        check_target(form, to)
    checkpoint = read_checkpoint(args.file, key=args.key)
    read = [Path(checkpoint.path), *(Path(checkpoint.path, name) for name in WEIGHTS)]
    if same := next((out for out in (args.convert, to) if out and any(map(partial(same_file, out), read))), None):
        raise UserError(f"{same} is the file that is read: give another name")
    lines = describe(checkpoint)
    if args.convert:
        save_canonical(checkpoint, args.convert)
        lines.append(f"written: {args.convert}")
    if to:
        export(checkpoint, form, to)
        left = left_out(checkpoint, form)
        lines.append(f"written for {form}: {to}" + (f"; not in this form: {left}" if left else ""))
    with contextlib.suppress(BrokenPipeError):  # head or less has read enough
        print("\n".join(printable(line) for line in lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
