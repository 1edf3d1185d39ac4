# The table of contents. Every target is one line over bin/; nothing is decided here.
SHELL := /bin/bash
.DEFAULT_GOAL := help

TASK ?= tiny
STAGE ?= midtrain
options = $(if $(VARIANT),--variant '$(VARIANT)') $(if $(NAME),--name '$(NAME)') $(foreach s,$(SET),--set '$(s)')
iteration = $(if $(ITER),--set 'iteration=$(ITER)')
recipe = recipes/$(TASK)/$@.yaml

.PHONY: help setup preprocess convert midtrain export plan test check

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  with         TASK=tiny VARIANT= NAME= SET="a.b=c d=e" ITER=latest|500'

setup: ## .venv with pinned dependencies (HOST_ONLY=1: the login node's half)
	@bin/setup $(if $(HOST_ONLY),host,engine)

preprocess: ## text to tokens: tokenizer, Megatron .bin and .idx
	@bin/setup engine && bin/tanren preprocess $(recipe) $(options)

convert: ## a Hugging Face base to a megatron-core checkpoint
	@bin/setup engine && bin/tanren convert $(recipe) $(options) --needs

midtrain: ## continued pre-training, with what it stands on and the export
	@bin/setup engine && bin/tanren midtrain $(recipe) $(options) --needs --then export

export: ## a checkpoint to a Hugging Face folder
	@bin/setup engine && bin/tanren export $(recipe) $(options) $(iteration) --needs

plan: ## what STAGE of TASK would do; changes nothing
	@bin/setup host && bin/tanren plan recipes/$(TASK)/$(STAGE).yaml $(options)

test: ## every test that this machine can run
	@bin/setup dev && .venv/bin/python -m pytest -n auto

check: ## format, lint, types, imports, shell scripts
	@bin/setup dev && bin/check
