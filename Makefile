# demo, test and check set up what they need first, in .venv of this checkout. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
BIN := .venv/bin
EXPORT := $(BIN)/uv export --quiet --frozen --extra segmentation --extra slurm --no-emit-project --no-hashes --no-annotate --no-header
# A process per core; a file's tests stay together, since they share what they set up.
PARALLEL := -n auto --dist loadfile
DEMO := demo
DEMO_TASKS := imagenet_finetune imagenet_linprobe imagenet_knn imagenet_a imagenet_r imagenet_sketch imagenet_c coco ade20k
.DEFAULT_GOAL := help
.PHONY: help install demo test check nightly campaign gpu-check gpu-bundle speed lint lock clean

help:
	@echo "make demo     install, pre-train for a minute, run the main tasks on the miniature, write the tables to $(DEMO)/"
	@echo "make test     install, run all tests"
	@echo "make check    install, lint, run the quick tests"
	@echo "make gpu-check   half an hour on a GPU: does everything run on it, with the CPU's numbers, and how fast?"
	@echo "make gpu-bundle  the same in a folder for a GPU machine without network"
	@echo "make speed    every speed figure that this machine can give: to speed/; docs/speed.md has arguments"
	@echo "make campaign    kills, full disks, bad inputs and hostile files against every command: half an hour, one table"
	@echo "make nightly  short runs on mae_mini beside committed numbers: some minutes"
	@echo "make install  set up .venv with the versions in uv.lock"
	@echo "make lint     install, ruff, mypy, codespell, the lock files"
	@echo "make lock     write uv.lock and requirements.lock after a change to pyproject.toml"
	@echo "make clean    remove what demo and the tools left"

install: .venv/.installed

# The stamp is written last: an interrupted installation is taken up again. --inexact leaves what was added by hand.
.venv/.installed: uv.lock pyproject.toml Makefile $(wildcard mae_core/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) or sys.version_info >= (3, 14))' || \
		{ echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; give another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks the venv module; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "== setting up .venv (about 6 GB, some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock uv
	$(BIN)/uv sync --quiet --frozen --inexact --extra segmentation --extra slurm
	@echo "== compiling the reader of training images, which can be done without"
	-@$(BIN)/python -m mae_core.native
	@touch $@
	@echo "== .venv is ready"

# After a change to the dependencies in pyproject.toml.
lock: .venv/.installed
	$(BIN)/uv lock
	$(EXPORT) --output-file requirements.lock

demo: install
	@echo "== 1/4 unlabelled images, generated"
	$(BIN)/python -m transfer.miniature --out $(DEMO)/data --unlabelled 5000
	@echo "== 2/4 pre-training for less than a minute (mae_mini, which step 4 evaluates, had longer)"
	$(BIN)/python -m mae_core.pretrain --data $(DEMO)/data/unlabelled --arch vit_mini_patch8 --recipe mini \
		--set epochs=5 --out $(DEMO)/pretrain
	@echo "== 3/4 what it reconstructs, and mae_mini beside it"
	$(BIN)/python -m mae_core.reconstruct --ckpt $(DEMO)/pretrain/mae.safetensors results/miniature/mae_mini.safetensors \
		--images $(DEMO)/data/imagenet/val --limit 8 --out $(DEMO)/reconstruction.png
	@echo "== 4/4 these tasks on mae_mini and on random weights"
	$(BIN)/python benchmarks/run_all.py --recipe mini --out $(DEMO) --tasks $(DEMO_TASKS)

test: install
	$(BIN)/python -m pytest $(PARALLEL)

check: install lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

gpu-check: install
	$(BIN)/python benchmarks/gpu_check.py

# make speed ARGS="--compare /path/to/mae --data /datasets/imagenet/train"
speed: install
	$(BIN)/python benchmarks/speed_all.py $(ARGS)

gpu-bundle: install
	$(BIN)/python benchmarks/gpu_bundle.py

# Do the trainings still leave the numbers that they left? CONTRIBUTING.md says what it notices.
nightly: install
	$(BIN)/python -m tests.guard

# docs/campaign.md shows its table.
campaign: install
	$(BIN)/python -m tests.campaign

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/uv lock --quiet --check --offline
	@$(EXPORT) | diff requirements.lock - || { echo "error: requirements.lock is not uv.lock's: make lock" >&2; exit 1; }

clean:
	rm -rf $(DEMO) gpu-check gpu-bundle .hypothesis .pytest_cache .ruff_cache .mypy_cache dist
