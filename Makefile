# The table of contents. Every target is one line over bin/; nothing is decided here.
SHELL := /bin/bash
.DEFAULT_GOAL := help

TASK ?= tiny
STAGE ?= midtrain
where = $(if $(RUNTIME),--runtime '$(RUNTIME)') $(foreach b,$(BIND),--bind '$(b)')
options = $(if $(VARIANT),--variant '$(VARIANT)') $(if $(NAME),--name '$(NAME)') $(foreach s,$(SET),--set '$(s)') $(where)
iteration = $(if $(ITER),--set 'iteration=$(ITER)')
recipe = recipes/$(TASK)/$@.yaml

.PHONY: help setup preprocess convert midtrain export plan build-image image-info lock shell test test-images check

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  with         TASK=tiny VARIANT= NAME= SET="a.b=c d=e" ITER=latest|500 RUNTIME=native BIND=/data'

setup: ## .venv with pinned dependencies (HOST_ONLY=1: the login node's half)
	@bin/setup $(if $(HOST_ONLY),host,engine)

preprocess: ## text to tokens: tokenizer, Megatron .bin and .idx
	@bin/setup host && bin/tanren preprocess $(recipe) $(options)

convert: ## a Hugging Face base to a megatron-core checkpoint
	@bin/setup host && bin/tanren convert $(recipe) $(options) --needs

midtrain: ## continued pre-training, with what it stands on and the export
	@bin/setup host && bin/tanren midtrain $(recipe) $(options) --needs --then export

export: ## a checkpoint to a Hugging Face folder
	@bin/setup host && bin/tanren export $(recipe) $(options) $(iteration) --needs

plan: ## what STAGE of TASK would do; changes nothing
	@bin/setup host && bin/tanren plan recipes/$(TASK)/$(STAGE).yaml $(options)

build-image: ## a .sif of IMAGE=train|te19|nemo|merge|cpu and its lock
	@bin/setup host && bin/tanren image build $(IMAGE) $(if $(RUNTIME),--runtime '$(RUNTIME)')

image-info: ## what an image is, from its lock and from its labels
	@bin/setup host && bin/tanren image info $(IMAGE)

lock: ## containers/locks written anew (UPGRADE=1: the newest versions)
	@bin/setup dev && bin/tanren image lock $(if $(UPGRADE),--upgrade)

shell: ## a shell in IMAGE
	@bin/setup host && bin/tanren shell $(IMAGE) $(where)

test: ## every test that this machine can run
	@bin/setup dev && .venv/bin/python -m pytest -n auto

test-images: ## builds cpu.sif twice and trains in it; needs Apptainer and a network
	@bin/setup dev && .venv/bin/python -m pytest -n 2 -m images --durations 5

check: ## format, lint, types, imports, shell scripts
	@bin/setup dev && bin/check
