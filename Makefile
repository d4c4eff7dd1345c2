# make install  the environment of the bundles, .venv (EXTRAS=dicom,register adds packages: setup.cfg)
# make demo    pre-train, fine-tune and segment synthetic CT on the CPU, ending with demo/out/report.html   (FRESH=1 starts over)
# make test    all tests
# make check   formatting, lint, make docs and make test: before a commit is sent to others
# make docs    the documentation site, site/index.html, with links, notebooks and Dockerfile checked (250 MB more in .venv)
# make test-legacy   weights of the real MONAI 1.4.0 compute the same here (an environment of its own, .venv-legacy)
# make test-label    packed bundles in a real MONAI Label server (an environment of its own, .venv-label-1.6.1, 3.7 GB); LABEL_MONAI=1.5.2: with that
#                    MONAI. Between a DICOM server and OHIF too, where Orthanc is installed (Debian: orthanc orthanc-dicomweb)
# make test-triton   the Triton kernel by Triton's interpreter, no GPU needed (an environment of its own, .venv-triton, 2 GB; 6 GB with CUDA)
# make test-matrix   the workflow tests with the oldest and the newest PyTorch and MONAI of setup.cfg (environments of their own, 5 GB
#                    each with CUDA; MATRIX="2.11.0_1.5.2": one pair alone)
# make mutants       small changes of the code where errors would be silent: do the tests notice? (half an hour)
# make test-kills    each workflow is killed 20 times at random moments, and must end as if it had not been (an hour)
# make gpu-kit       what a GPU machine without a network needs to check everything: gpu-kit/ (docs/explanation/gpu.md); DATA=DIR: the
#                    curve on your own labelled CT in MSD form, instead of synthetic patients
# Each sets up its own virtual environment first; PYTHON=python3.12 chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
LEGACY_VENV ?= .venv-legacy
LABEL_MONAI ?= 1.6.1
MATRIX ?= 2.11.0_1.5.2 2.11.0_1.6.1 2.14.1_1.5.2 2.14.1_1.6.1
LABEL_VENV ?= .venv-label-$(LABEL_MONAI)
TRITON_VENV ?= .venv-triton
INSTALLED = $(VENV)/.installed
TESTED = $(VENV)/.installed-test
EXTRAS ?=

.PHONY: install demo test docs mutants test-kills test-legacy test-label test-triton check lint clean gpu-kit
.DEFAULT_GOAL := demo

PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt

install: $(INSTALLED)
	$(if $(EXTRAS),$(PIP) --editable ".[$(EXTRAS)]")
	@echo "Installed in $(VENV). Next: source $(VENV)/bin/activate, or make demo."

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 90 packages and 1.5 GB on disk, a few minutes. With CUDA, which PyTorch brings"
	@echo "on Linux, 3 GB to download and 6 GB on disk; docs/getting-started/install.md says how to leave it out."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(TESTED): $(INSTALLED)
	@echo "Installing what the tests need into $(VENV): about 95 packages and 1 GB on disk."
	$(PIP) --editable ".[test]"
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python -m demo.run $(if $(FRESH),--fresh)

test: $(TESTED)
	$(VENV)/bin/python -m pytest

$(VENV)/.docs: $(TESTED)
	$(PIP) --editable ".[test,docs]"
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "Built site/. To read it: $(VENV)/bin/python -m http.server --directory site"
	$(VENV)/bin/python -m pytest tests/docs

$(LEGACY_VENV)/.installed:
	$(PYTHON) -m venv $(LEGACY_VENV)
	$(LEGACY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check monai==1.4.0 torch==2.13.0 einops==0.8.2
	touch $@

test-legacy: $(TESTED) $(LEGACY_VENV)/.installed
	LEGACY_PYTHON=$(abspath $(LEGACY_VENV))/bin/python $(VENV)/bin/python -m pytest tests/legacy

# pydicom and its company: the versions that MONAI Label 0.8.5 works with. dcmqi: its writer of DICOM SEG. rich and safetensors: what the
# bundles import beside them.
$(LABEL_VENV)/.installed:
	$(PYTHON) -m venv $(LABEL_VENV)
	$(LABEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 monai==$(LABEL_MONAI) monailabel==0.8.5 \
	  "pydicom<3" "pynetdicom<3" "dicomweb-client[gcp]>=0.59.1,<0.60" dcmqi==1.5.7 openvino==2026.4.1 rich==15.0.0 safetensors==0.8.0
	touch $@

test-label: $(TESTED) $(LABEL_VENV)/.installed
	LABEL_PYTHON=$(abspath $(LABEL_VENV))/bin/python $(VENV)/bin/python -m pytest tests/label

# Triton without a version: a PyTorch for CUDA brings the one that it was built with.
$(TRITON_VENV)/.installed:
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 triton numpy==2.4.6 pytest==9.2.0
	touch $@

test-triton: $(TRITON_VENV)/.installed
	TRITON_INTERPRET=1 $(TRITON_VENV)/bin/python -m pytest -o addopts="" tests/common/networks/fast/test_bias_gradient_kernel.py

mutants: $(TESTED)
	$(VENV)/bin/python -m tools.mutants

# KILLS: kills for each workflow
test-kills: $(TESTED)
	KILLS=$(or $(KILLS),20) $(VENV)/bin/python -m pytest tests/workflows/test_random_kills.py tests/workflow/test_engine.py

# One environment for each pair of versions; the workflow tests in each, one after the other.
$(MATRIX:%=.venv-matrix-%/.installed): .venv-matrix-%/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-matrix-$*
	.venv-matrix-$*/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]" torch==$(word 1,$(subst _, ,$*)) monai==$(word 2,$(subst _, ,$*))
	touch $@

.PHONY: test-matrix $(MATRIX:%=matrix-%)
test-matrix: $(MATRIX:%=matrix-%)

$(MATRIX:%=matrix-%): matrix-%: .venv-matrix-%/.installed
	.venv-matrix-$*/bin/python -m pytest tests/workflows

lint: $(TESTED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

check: lint docs test

gpu-kit: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.gpu_check.kit --out gpu-kit $(if $(DATA),--data "$(DATA)")

clean:
	rm -rf gpu-kit site $(VENV) $(LEGACY_VENV) $(TRITON_VENV) .venv-label-* .venv-matrix-* demo/out *.egg-info .pytest_cache .ruff_cache

# Workflows: many runs on this machine or on a cluster, PROFILE=slurm (docs/how-to/on-a-cluster.md). Each continues when it is repeated.
# make few-label-curve   what pre-training gains: Dice over the number of labelled patients, with pre-training and from scratch.
#                        STUDY=openkbp DATA=DIR OUT=DIR choose another study, its data and its folder (docs/how-to/measure-the-gain.md)
# make headroom          what a pre-training could gain at most: floor, ceiling, training from scratch until it converges
# make ablation          no proxy task, each alone, the pairs, all three
# make search            recipes of all arms, scored on patients that the study never scores
# make cross-validation  folds of a task or of your own data, their table and ensemble: FOLDS=FILE.yaml DATA=DIR OUT=DIR
# make decathlon         ten tasks, five folds, the paper's table and the leaderboard's archive: FOLDS=FILE.yaml DATA=DIR OUT=DIR
# LIST=1 says what is left and runs nothing; THREADS=N and GPUS=N set threads of a job and GPUs of this machine.
STUDY ?= demo
WORKFLOW = $(VENV)/bin/python -m workflow
WORKFLOW_OPTIONS = $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(if $(PROFILE),--profile "$(PROFILE)") \
  $(if $(THREADS),--threads $(THREADS)) $(if $(GPUS),--gpus $(GPUS)) $(if $(TRACKING_URI),--tracking_uri "$(TRACKING_URI)") $(if $(filter-out 0,$(SHARED_DISK)),--shared_disk) $(if $(filter-out 0,$(LIST)),--list)

$(VENV)/.installed-workflow: $(INSTALLED)
	$(PIP) --editable ".[workflow]"
	touch $@

.PHONY: few-label-curve headroom ablation search cross-validation decathlon

few-label-curve headroom ablation search: $(VENV)/.installed-workflow
	$(WORKFLOW) $(subst -,_,$@) --study "$(STUDY)" $(WORKFLOW_OPTIONS)

cross-validation decathlon: $(VENV)/.installed-workflow
	$(WORKFLOW) $(subst -,_,$@) $(if $(FOLDS),--folds "$(FOLDS)") $(WORKFLOW_OPTIONS)
