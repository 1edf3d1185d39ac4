# The table of contents. Every target is one line over bin/; nothing is decided here.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# A misspelled NODE=2 would be ignored, and paid for.
known := A AFTER ALLOW_DIRTY B BASE BIND CHAIN CONTROL FOLLOW FORCE FP8 GPUS HOST_ONLY HOURS IMAGE ITER LIMIT MAX_TOKENS N NAME NODES NOW PARTS PROMPT PROMPTS QUESTION REAL RESERVATION RUN RUNTIME SAVE SET SITE STAGE STAGES STEPS TASK TASKS TEMPERATURE TYPE UPDATE UPGRADE VARIANT VERIFY WITH
passed := CI DATA DEBIAN_MIRROR IMAGES PYTHON RUNS SHELL TMPDIR CUDA_% HF_% MAKE% PIP_% TANREN_% WANDB_%
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v)))
strange := $(filter-out $(known) $(passed),$(given))
$(if $(strip $(strange)),$(error there is no variable $(strip $(strange)); make help shows those that there are))
# Nor has make midtrain a use for STEPS=10.
own := $(filter $(known),$(given))
idle := $(if $(own),$(shell bin/idle-variables '$(or $(MAKECMDGOALS),help)' '$(own)'))
$(if $(strip $(idle)),$(error make $(or $(MAKECMDGOALS),help) has no use for $(strip $(idle)); fields of a recipe are SET="field=value"))

TASK ?= tiny
STAGE ?= midtrain
job = $(if $(SITE),--site '$(SITE)') $(if $(NODES),--nodes $(NODES)) $(if $(HOURS),--hours $(HOURS)) $(if $(TYPE),--type '$(TYPE)') $(if $(RESERVATION),--reservation '$(RESERVATION)')
waits = $(foreach a,$(AFTER),--after '$(a)') $(if $(CHAIN),--chain $(CHAIN)) $(parts) $(dirty)
parts = $(if $(PARTS),--parts $(PARTS))
where = $(if $(RUNTIME),--runtime '$(RUNTIME)') $(foreach b,$(BIND),--bind '$(b)')
dirty = $(if $(ALLOW_DIRTY),--allow-dirty)
options = $(if $(VARIANT),--variant '$(VARIANT)') $(if $(NAME),--name '$(NAME)') $(foreach s,$(SET),--set '$(s)') $(where) $(job)
iteration = $(if $(ITER),--set 'iteration=$(ITER)')
of = $(if $(filter-out midtrain,$(STAGE)),--set 'of=stage:$(STAGE)')
recipe = recipes/$(TASK)/$@.yaml

.PHONY: help setup doctor env-eval env-merge env-nemo fetch preprocess convert midtrain sft dpo pipeline export merge eval show generate fp8-gate bench plan submission build-image image-info lock shell status report wandb-sync logs cancel reproduce diff test test-long test-kernels test-images test-schedulers test-harness test-merge test-nemo check

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  with         TASK=tiny VARIANT= NAME= SET="a.b=c d=e" ITER=latest|500 RUNTIME=native BIND=/data'
	@echo '  on clusters  SITE=abci3 NODES=2 HOURS=24 TYPE= AFTER=jobid CHAIN=3 PARTS=8 RESERVATION= ALLOW_DIRTY=1'

setup: ## .venv with pinned dependencies (HOST_ONLY=1: the login node's half)
	@bin/setup $(if $(HOST_ONLY),host,engine)

doctor: ## what this machine has and lacks for each stage (GPUS=1: measures every GPU)
	@bin/setup host && bin/tanren doctor $(if $(SITE),--site '$(SITE)') $(if $(GPUS),--gpus) $(where)

env-eval: ## .venv-eval with lm-evaluation-harness, for make eval
	@bin/setup eval

env-merge: ## .venv-merge with mergekit, for make merge
	@bin/setup merge

env-nemo: ## .venv-nemo with nemo-toolkit for a CPU, for make test-nemo
	@bin/setup nemo

fetch: ## what TASK takes from the Hugging Face hub (VERIFY=1: hash again; UPDATE=1: ask anew)
	@bin/setup host && bin/tanren fetch recipes/$(TASK) $(if $(VARIANT),--variant '$(VARIANT)') $(if $(VERIFY),--verify) $(if $(UPDATE),--update)

preprocess: ## text to tokens: tokenizer, Megatron .bin and .idx
	@bin/setup host && bin/tanren preprocess $(recipe) $(options) $(waits)

convert: ## a Hugging Face base to a megatron-core checkpoint
	@bin/setup host && bin/tanren convert $(recipe) $(options) $(waits) --needs

midtrain: ## continued pre-training, with what it stands on and the export
	@bin/setup host && bin/tanren midtrain $(recipe) $(options) $(waits) --needs --then export

sft: ## supervised fine-tuning on conversations, with what it stands on and the export
	@bin/setup host && bin/tanren sft $(recipe) $(options) $(waits) --needs --then export

dpo: ## tuning on preferences, with what it stands on and the export
	@bin/setup host && bin/tanren dpo $(recipe) $(options) $(waits) --needs --then export

pipeline: ## STAGES=preprocess,convert,midtrain,export one after the other
	@bin/setup host && bin/tanren pipeline recipes/$(TASK) --stages '$(STAGES)' $(options) $(waits)

export: ## a checkpoint of STAGE=midtrain|sft|dpo to a Hugging Face folder
	@bin/setup host && bin/tanren export $(recipe) $(options) $(waits) $(iteration) $(of) --needs

merge: ## a soup of models by mergekit, with what it stands on
	@bin/setup host && $(if $(filter-out native,$(RUNTIME)),,bin/setup merge && )bin/tanren merge $(recipe) $(options) $(waits) --needs

eval: ## scores of the export of STAGE=midtrain|sft|dpo, or of STAGE=merge (TASKS=gsm8k,... LIMIT=)
	@bin/setup host && bin/setup eval && bin/tanren eval $(recipe) $(options) $(waits) $(iteration) $(of) $(if $(TASKS),--set 'tasks=[$(TASKS)]') $(if $(LIMIT),--set 'limit=$(LIMIT)') --needs

show: ## N=3 examples of STAGE=sft|dpo, with what of them is trained on
	@bin/setup host && bin/tanren show $(STAGE) $(TASK) $(if $(N),--n $(N)) $(options)

generate: ## what the export of STAGE answers to PROMPT, or to each line of PROMPTS=file.jsonl
	@bin/setup host && bin/tanren generate recipes/$(TASK)/$(STAGE).yaml $(if $(PROMPTS),--prompts '$(PROMPTS)',--prompt "$$PROMPT") $(if $(VARIANT),--variant '$(VARIANT)') $(if $(NAME),--name '$(NAME)') $(if $(RUNTIME),--runtime '$(RUNTIME)')

fp8-gate: ## the first STEPS=200 of STAGE in bf16 and in FP8="delayed tensorwise", compared (CONTROL=1: bf16 twice)
	@bin/setup host && bin/tanren gate recipes/$(TASK)/$(STAGE).yaml $(if $(STEPS),--steps $(STEPS)) $(foreach f,$(FP8),--fp8 '$(f)') $(if $(CONTROL),--control) $(options) $(dirty) --needs

bench: ## how fast STAGE is here, and where a step's time goes (STEPS=12, REAL=1: own data, SAVE=1)
	@bin/setup host && bin/tanren bench recipes/$(TASK)/$(STAGE).yaml $(if $(STEPS),--steps $(STEPS)) $(if $(REAL),--real) $(if $(SAVE),--save) $(options) $(dirty)

plan: ## what STAGE of TASK would do; changes nothing
	@bin/setup host && bin/tanren plan recipes/$(TASK)/$(STAGE).yaml $(options) $(waits) $(iteration)

submission: ## a .sif that answers with the export of STAGE, offline (BASE=train|cpu MAX_TOKENS= TEMPERATURE= QUESTION=)
	@bin/setup host && bin/tanren submission recipes/$(TASK)/$(STAGE).yaml $(if $(BASE),--base '$(BASE)') $(if $(MAX_TOKENS),--max-tokens $(MAX_TOKENS)) $(if $(TEMPERATURE),--temperature $(TEMPERATURE)) $(if $(QUESTION),--question "$$QUESTION") $(if $(VARIANT),--variant '$(VARIANT)') $(if $(NAME),--name '$(NAME)') $(if $(RUNTIME),--runtime '$(RUNTIME)')

build-image: ## a .sif of IMAGE=train|te19|nemo|merge|cpu and its lock
	@bin/setup host && bin/tanren image build $(IMAGE) $(if $(RUNTIME),--runtime '$(RUNTIME)')

image-info: ## what an image is, from its lock and from its labels
	@bin/setup host && bin/tanren image info $(IMAGE)

lock: ## containers/locks written anew (UPGRADE=1: the newest versions)
	@bin/setup dev && bin/tanren image lock $(if $(UPGRADE),--upgrade)

shell: ## a shell in IMAGE
	@bin/setup host && bin/tanren shell $(IMAGE) $(where)

status: ## every run: state, job, step, loss, time left
	@bin/setup host && bin/tanren status

report: ## RUN's page, report.html (WITH="mine/sft mine/sft-b": others laid over it)
	@bin/setup host && bin/tanren report $(RUN) $(WITH)

wandb-sync: ## sends Weights & Biases what it has not yet of RUN
	@bin/setup host && bin/tanren wandb-sync $(RUN)

logs: ## the newest log of RUN (FOLLOW=1: and what comes)
	@bin/setup host && bin/tanren logs $(RUN) $(if $(FOLLOW),--follow)

cancel: ## end the jobs of RUN, saved (NOW=1: at once)
	@bin/setup host && bin/tanren cancel $(RUN) $(if $(NOW),--now)

reproduce: ## RUN once more from its passport, in a new folder (NAME=; FORCE=1: whatever differs)
	@bin/setup host && bin/tanren reproduce '$(RUN)' $(if $(FORCE),--force) $(if $(NAME),--name '$(NAME)')

diff: ## in what runs A and B of a stage differ, and their losses side by side
	@bin/setup host && bin/tanren diff '$(A)' '$(B)'

test: ## the tests that need nothing else
	@bin/setup dev && .venv/bin/python -m pytest -n auto --dist worksteal

test-long: ## more of the same, with longer trainings
	@bin/setup dev && .venv/bin/python -m pytest -n auto --dist worksteal -m long --durations 5

test-kernels: ## the GPU kernels in Triton's interpreter, on a CPU; installs Triton (190 MB)
	@bin/setup kernels && .venv/bin/python -m pytest -n 2 -m kernels tests/engine

test-images: ## builds cpu.sif twice and trains in it; needs Apptainer and a network
	@bin/setup dev && .venv/bin/python -m pytest -n 2 -m images --durations 5 tests/images

test-schedulers: ## jobs of the schedulers that run here: Slurm, Grid Engine, a PBS imitation
	@bin/setup dev && .venv/bin/python -m pytest -n 3 -m schedulers --durations 5 tests/launch

test-harness: ## a tiny export scored by the real lm-evaluation-harness; installs it
	@bin/setup dev && bin/setup eval && .venv/bin/python -m pytest -n 0 -m harness --durations 5

test-merge: ## soups of tiny checkpoints by the real mergekit; installs it
	@bin/setup dev && bin/setup merge && .venv/bin/python -m pytest -n 0 -m merge --durations 5

test-nemo: ## conversions and training against the real nemo-toolkit; installs it
	@bin/setup dev && bin/setup nemo && .venv/bin/python -m pytest -n 0 -m nemo --durations 5

check: ## format, lint, types, imports, shell scripts
	@bin/setup dev && bin/check
