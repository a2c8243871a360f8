# launch.mk: which backend there is, what has to be installed for it, and the commands that a user
# types first.
#   detect.sh   GPUs, CUDA and NCCL        packages.sh   the rest        run.sh   make run

# ---- which backend: CUDA where a kernel runs on a GPU, else the CPU (BACKEND=cpu|cuda overrides)

# in a path these signs would end a line of make, or a word of the shell
hash := \#
$(if $(findstring $(hash),$(CUDA_HOME)$(NCCL_HOME))$(findstring ',$(CUDA_HOME)$(NCCL_HOME))$(word \
  2,$(CUDA_HOME))$(word 2,$(NCCL_HOME)),\
  $(error CUDA_HOME and NCCL_HOME may have no $(hash), no ' and no space in them))
-include build/detected.mk
BACKEND ?= $(or $(DETECTED),cpu)
B := build/$(BACKEND)
# Also where a CUDA that was found is there no more. Not twice in one make, which starts anew when
# this has been made. A script with a date in the future is not newer either.
build/detected.mk: $(if $(MAKE_RESTARTS),,launch/detect.sh \
    $(if $(filter-out $(CUDA_HOME):$(NCCL_HOME),$(LOOKED_IN)),look-again) \
    $(if $(filter cuda,$(DETECTED)),$(if $(wildcard $(CUDA)/bin/nvcc),,look-again)))
	@mkdir -p build 2>/dev/null && [ -w build ] || exit 0; \
	  CUDA_HOME='$(CUDA_HOME)' NCCL_HOME='$(NCCL_HOME)' MPICXX='$(MPICXX)' \
	  launch/detect.sh >$@.new && mv $@.new $@ && \
	  { [ $@ -nt launch/detect.sh ] || touch -r launch/detect.sh $@; }

# ---- packages

# what is missing is installed first; then the tools are looked for again
PROBE = launch/packages.sh probe $(BACKEND) $(COMM) \
  '$(LINK) $(if $(filter cuda,$(BACKEND)),$(NCCL_FLAGS))' '$(LIBS) $(LIBS_NCCL)'
$(B)/packages: launch/packages.sh
	@$(PROBE) >/dev/null 2>&1 || { [ $$? != 2 ] && $(MAKE) --no-print-directory deps; } || \
	  { $(PROBE); exit 1; }
	@touch $@
$(B)/ready: Makefile cpu/cpu.mk $(B)/packages
	@$(PROBE)
	@touch $@

# ---- commands

.PHONY: run replay generate deps detect look-again
# to launch/run.sh through the environment, where no sign in a name means anything; not a PROMPT
# that was there before, which may be zsh's
export override PROMPT := $(if $(filter environment%,$(origin PROMPT)),,$(value PROMPT))
export WHY
export override DATA := $(value DATA)
export override ARGS := $(value ARGS)
export override CHECKPOINT := $(value CHECKPOINT)
export override TRAIN_ARGS := $(value TRAIN_ARGS)
export override PAGE := $(value PAGE)
## make run [DATA=file] [STRATEGY=serial|replicate|zero1|fsdp|cp|tp|tp-sequence|pp|3d] [NP=ranks]
##          [ARGS=options]  train a GPT and print a sample of what it learned
## make replay [STRATEGY=fsdp] [NP=4] [PAGE=build/replay.html] [ARGS=options]
##                          a step of all ranks to look at, event by event
## make generate [PROMPT=text] [CHECKPOINT=dir] [NP=ranks] [ARGS=options] [TRAIN_ARGS=options]
##                          continue a text with a model (trains one first where there is none);
##                          all of these may be in the environment, but for PROMPT
run replay generate: built
	@BACKEND=$(BACKEND) THREADS=$(THREADS) MPIEXEC='$(MPIEXEC)' launch/run.sh $@

deps:  ## make deps                install what is missing (MPICH, oneDNN, nlohmann/json, xxHash)
	@launch/packages.sh install
detect:  ## make detect              look for GPUs, CUDA and NCCL again (CUDA_HOME= NCCL_HOME=)
	@rm -f build/detected.mk && $(MAKE) --no-print-directory help
