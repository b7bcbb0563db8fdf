"""mae-transfer COMMAND: each command is the main of one module, imported only when it is chosen."""

import importlib
import sys

from mae_core.settings import unknown

COMMANDS = {
    "run": ("benchmarks.run_all", "one checkpoint through every task, to the paper's tables"),
    "plan": ("benchmarks.run_all", "say what `run` would do, with which data, and stop"),
    "status": ("benchmarks.run_all", "the plan of `run`, with what is done, at work or queued"),
    "ls": ("benchmarks.run_all", "list the tasks"),
    "report": ("benchmarks.report", "make the tables and the page again from all records"),
    "export": ("benchmarks.export", "write the results as LaTeX, a model card or JSON"),
    "compare": ("benchmarks.compare", "is checkpoint A better than B? Paired tests on the same images"),
    "verify": ("benchmarks.verify", "compute the numbers of records again from their stored predictions"),
    "checkpoint": ("mae_core.checkpoint.__main__", "say what a checkpoint holds; write it in another form"),
    "pretrain": ("mae_core.pretrain", "pre-train a masked autoencoder"),
    "watch": ("benchmarks.watch", "follow a pre-training: tasks on its kept weights as they appear, and a curve"),
    "reconstruct": ("mae_core.reconstruct", "draw images masked, reconstructed and as they are"),
    "ablations": ("benchmarks.ablations", "the paper's ablations: pre-train and evaluate every cell of a table"),
    "speed": ("benchmarks.speed", "measure images/s and memory of pre-training, fine-tuning, evaluation, loading"),
}
# Flags that a command's name stands for.
IMPLIED = {"plan": ["--plan"], "status": ["--plan"], "ls": ["--list"]}


def main() -> int:
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print("usage: mae-transfer COMMAND ...\n\nmae-transfer COMMAND --help lists the flags of one command:\n")
        for command, (_, does) in COMMANDS.items():
            print(f"  {command:<12} {does}")
        return 0
    if name not in COMMANDS:
        print(f"mae-transfer: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"mae-transfer {name}", *IMPLIED.get(name, ()), *arguments]
    try:
        return importlib.import_module(COMMANDS[name][0]).main()
    except ModuleNotFoundError as e:
        if str(e.name).partition(".")[0] in ("mae_core", "transfer", "benchmarks"):
            raise
        print(f"error: the package {e.name} is not installed; after an update: make install", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # during the imports, which take seconds, or where a command does not handle it itself
        print("stopped", file=sys.stderr)
        return 130
