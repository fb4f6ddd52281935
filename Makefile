# `make help` lists the targets. ARGS carries Hydra overrides: make train-aekl ARGS="data=table data.table=scans.csv name=mine"
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := experiment=demo name=demo
VOXELS := experiment=voxels name=voxels
# A mistyped ARGS would start a command without its arguments.
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(filter-out ARGS BUDGET DATA NAME PYTHON PICTURES,$(GIVEN))
$(if $(UNKNOWN),$(error no variable $(UNKNOWN): give ARGS=, BUDGET=, DATA=, NAME= or PYTHON=))
# Raw scans that do not exist are refused before anything is installed.
ifneq ($(filter ixi cohort,$(MAKECMDGOALS)),)
$(if $(DATA),,$(error give the folder of the raw scans, DATA=MY_BIDS))
$(if $(shell test -e "$(DATA)" && echo yes),,$(error there is no $(DATA): give the folder of the raw scans, DATA=MY_BIDS))
endif
ifneq ($(filter cohort,$(MAKECMDGOALS)),)
$(if $(NAME),,$(error give the cohort a name, NAME=mine))
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo ixi cohort test test-faults lint train-aekl train-pretrain train-repr train-prior train-supervised voxel-twin encode evaluate bench gpu-check tables pictures

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install the project into it

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev,preprocess]' -c constraints.txt
	touch $@

demo: $(STAMP) ## the whole method on a phantom cohort, on a CPU: data, three stages, prior, baselines, report
	$(BIN)/python train.py stage=aekl $(DEMO) $(ARGS)
	$(BIN)/python encode_latents.py $(DEMO) $(ARGS)
	$(BIN)/python train.py stage=pretrain $(DEMO) $(ARGS)
	$(BIN)/python train.py stage=repr $(DEMO) $(ARGS)
	$(BIN)/python train.py stage=prior $(DEMO) $(ARGS)
	$(BIN)/python train.py stage=supervised task=diagnosis $(DEMO) $(ARGS)
	$(BIN)/python train.py stage=supervised task=age $(DEMO) $(ARGS)
	$(BIN)/python evaluate.py $(DEMO) $(ARGS)

ixi: $(STAMP) ## 149 real scans of IXI: DATA=../shared/data/ixi_hh; ends in runs/ixi/evaluation/metrics.json
	$(BIN)/ldae cohort "$(DATA)" --name ixi --experiment ixi --derivatives derivatives/ixi_hh $(ARGS)

cohort: $(STAMP) ## the same for raw scans of your own: DATA=MY_BIDS NAME=mine
	$(BIN)/ldae cohort "$(DATA)" --name "$(NAME)" $(ARGS)

train-aekl: $(STAMP) ## stage 1: the autoencoder
	$(BIN)/python train.py stage=aekl $(ARGS)

train-supervised: $(STAMP) ## the supervised twin of y, a baseline of the probes: ARGS="task=age ..."
	$(BIN)/python train.py stage=supervised $(ARGS)

voxel-twin: $(STAMP) ## the demo's method in voxel space, a baseline: trained and evaluated, runs/voxels
	$(BIN)/python train.py stage=aekl $(VOXELS) $(ARGS)
	$(BIN)/python encode_latents.py $(VOXELS) $(ARGS)
	$(BIN)/python train.py stage=pretrain $(VOXELS) $(ARGS)
	$(BIN)/python train.py stage=repr $(VOXELS) $(ARGS)
	$(BIN)/python evaluate.py $(VOXELS) $(ARGS)

encode: $(STAMP) ## compress every scan once
	$(BIN)/python encode_latents.py $(ARGS)

train-pretrain: $(STAMP) ## stage 2: the latent diffusion model
	$(BIN)/python train.py stage=pretrain $(ARGS)

train-repr: $(STAMP) ## stage 3: semantic encoder and gradient estimator
	$(BIN)/python train.py stage=repr $(ARGS)

train-prior: $(STAMP) ## the distribution of y, from which `ldae sample` makes synthetic cohorts
	$(BIN)/python train.py stage=prior $(ARGS)

evaluate: $(STAMP) ## embeddings, probes, and the chosen evaluations
	$(BIN)/python evaluate.py $(ARGS)

bench: $(STAMP) ## what costs what, beside a straight port: ARGS="bench=full", ARGS="--against runs/bench/bench.json"
	$(BIN)/python -m ldae.bench $(ARGS)

BUDGET ?= 480

gpu-check: ## right and fast on this GPU? runs/gpu_check/gpu_check.md in BUDGET=480 seconds; ARGS="--parts steps,profile"
	PYTHONPATH=src $(or $(wildcard $(BIN)/python),$(PYTHON)) -m ldae.bench.gpu_check --budget $(BUDGET) $(ARGS)

tables: $(STAMP) ## the paper's tables of a finished run, beside the paper's figures: NAME=demo; Markdown, LaTeX, CSV
	$(BIN)/ldae tables "$(or $(NAME),$(error give the name of a run, NAME=demo))" $(ARGS)

PICTURES := manipulation_diagnosis_1 reconstruction_scan

pictures: ## the README's pictures, out of the demo's evaluation
	mkdir -p docs/pictures
	cp $(PICTURES:%=runs/demo/evaluation/%.png) docs/pictures

test: $(STAMP) ## the test suite
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-faults: $(STAMP) ## the slow tests: kills, damaged checkpoints, hostile inputs, several processes; ARGS="--repeats 3"
	$(BIN)/python -m pytest -q -m slow --durations 0 $(ARGS)

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
