# Threefold: `make` lists what there is. Everything that is built lives in build/<backend>/.
#   cpu/cpu.mk          what stands in for CUDA and NCCL
#   tests/tests.mk      tests, benchmarks and checks
#   launch/detect.sh    GPUs, CUDA and NCCL; launch/packages.sh: the rest; launch/run.sh: make run
#   `##` begins what help shows

MAKEFLAGS += -r# no rules but those below
.DEFAULT_GOAL := help

# ---- knobs

THREADS ?= $(shell nproc)
WERROR  ?=# -Werror (as .ci/run has it): another compiler's warnings do not stop a user
COMM    ?= nccl
# MPICH, though another MPI may be there; looked for at each use, since `make deps` may come first
MPICXX  ?= $(or $(shell command -v mpicxx.mpich 2>/dev/null),mpicxx)
MPIEXEC ?= $(subst mpicxx,mpiexec,$(MPICXX))

# ---- which backend: CUDA where a kernel runs on a GPU, else the CPU (BACKEND=cpu|cuda overrides)

-include build/detected.mk
BACKEND ?= $(or $(DETECTED),cpu)
B := build/$(BACKEND)
build/detected.mk: launch/detect.sh \
    $(if $(filter-out $(CUDA_HOME):$(NCCL_HOME),$(LOOKED_IN)),look-again)
	@mkdir -p build 2>/dev/null && [ -w build ] || exit 0; \
	  CUDA_HOME='$(CUDA_HOME)' NCCL_HOME='$(NCCL_HOME)' $< >$@.new && mv $@.new $@

# ---- sources: a folder a concern; the files with a main() are the programs

FOLDERS := launch theory report inference checkpoint support
PROGRAMS := train_gpt generate checkpoint show_schedule
main_train_gpt     := train_gpt.cpp
main_generate      := inference/generate.cpp
main_checkpoint    := checkpoint/tool.cpp
main_show_schedule := report/show_schedule.cpp
MAINS    := $(foreach program,$(PROGRAMS),$(main_$(program)))
SOURCES  := tensor.cu $(sort $(wildcard kernels/*.cu)) \
            $(filter-out $(MAINS),$(sort $(wildcard *.cpp $(FOLDERS:%=%/*.cpp))))

# ---- compilers: here for CUDA; cpu/cpu.mk changes them for the backends that stand in for it

CXXFLAGS  := -std=c++20 -O2 -g -Wall -Wextra $(WERROR) -Wno-unknown-pragmas -I.
NVCCFLAGS  = -std=c++20 -O3 -lineinfo -I. -Ikernels -ccbin $(MPICXX) \
             -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas \
             $(if $(WERROR),-Werror all-warnings -Xcompiler -Werror)
GENCODE   := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
             -gencode arch=compute_90,code=compute_90
ifneq ($(GPU_GENCODE),)
  GENCODE := $(GPU_GENCODE)
endif
ifeq ($(BACKEND),cuda)
  CXXFLAGS += -I$(CUDA)/include $(NCCL_FLAGS) $(if $(filter mpi,$(COMM)),-idirafter cpu/nccl)
  LIBS      = $(CUDA_LIBS) -lcublas -lxxhash -Xcompiler -fopenmp
  LIBS_NCCL = $(NCCL_LIBS)
  LINK      = $(NVCC) -ccbin $(MPICXX)
endif
include cpu/cpu.mk

# ---- rules

# what is missing is installed first; then the tools are looked for again
PROBE = launch/packages.sh probe $(BACKEND) $(COMM) '$(LINK)' '$(LIBS) $(LIBS_NCCL)'
$(B)/packages: launch/packages.sh
	@$(PROBE) >/dev/null 2>&1 || $(MAKE) --no-print-directory deps || { $(PROBE); exit 1; }
	@touch $@
$(B)/ready: Makefile cpu/cpu.mk $(B)/packages
	@$(PROBE)
	@touch $@

OBJECTS = $(patsubst %,$(B)/obj/%.o,$(SOURCES))
ifeq ($(STANDIN),)
$(B)/obj/%.cu.o: %.cu | $(B)/ready
	@mkdir -p $(@D)
	@echo "  $(BACKEND)  $<"
	@$(NVCC) $(NVCCFLAGS) $(GENCODE) -Xptxas -v -MMD -MP -c $< -o $@ 2>$(@:.o=.ptxas) || \
	  { cat $(@:.o=.ptxas); exit 1; }
endif
$(B)/obj/%.cpp.o: %.cpp | $(B)/ready
	@mkdir -p $(@D)
	@echo "  $(BACKEND)  $<"
	@$(MPICXX) $(CXXFLAGS) -MMD -MP -c $< -o $@

# with COMM=mpi ranks share a GPU; cpu/nccl stages through host memory in place of NCCL
WHERE := $(if $(filter cuda-mpi,$(BACKEND)-$(COMM)),/comm-mpi)
.SECONDEXPANSION:
$(PROGRAMS:%=$(B)/%): $(B)/%: $(B)/obj/$$(main_$$*).o $(OBJECTS)
	@$(LINK) $^ -o $@ $(LIBS) $(LIBS_NCCL)
$(PROGRAMS:%=$(B)/comm-mpi/%): $(B)/comm-mpi/%: $(B)/obj/$$(main_$$*).o $(OBJECTS) \
    $(NCCL_CPU:%=$(B)/obj/%.o)
	@mkdir -p $(@D)
	@$(LINK) $^ -o $@ $(LIBS)
-include $(shell find build -name '*.d' 2>/dev/null)
.SECONDARY:

# ---- targets

.PHONY: help build built run generate deps detect clean look-again
help:
	@echo 'Threefold ($(BACKEND) backend)$(if $(WHY),; no GPU is used: $(WHY))'
	@sed -nE 's/^([a-z].*)?## /  /p' $(filter %akefile %.mk,$(MAKEFILE_LIST))
	@tests/size.sh | sed 's/^/  /'

# to launch/run.sh through the environment, where no sign in a name means anything
export override DATA := $(value DATA)
export override ARGS := $(value ARGS)
export override PROMPT := $(value PROMPT)
export override CHECKPOINT := $(value CHECKPOINT)
## make run [DATA=file] [STRATEGY=serial|replicate|fsdp|cp|tp|pp|3d] [NP=ranks] [ARGS=options]
##                          train a GPT and print a sample of what it learned
## make generate [PROMPT=text] [CHECKPOINT=dir] [NP=ranks] [ARGS=options] [TRAIN_ARGS=options]
##                          continue a text with a model (trains one first where there is none)
run generate: built
	@BACKEND=$(BACKEND) THREADS=$(THREADS) MPIEXEC='$(MPIEXEC)' WHY='$(WHY)' launch/run.sh $@

build: $(PROGRAMS:%=$(B)$(WHERE)/%)  ## make build               compile the programs into build/
	@for p in $(PROGRAMS); do [ "$$(readlink build/$$p)" = $(BACKEND)$(WHERE)/$$p ] || \
	  ln -sfn $(BACKEND)$(WHERE)/$$p build/$$p || exit 1; done
built:  # for those who type no -j
	@$(MAKE) --no-print-directory -j$(THREADS) build

include tests/tests.mk

deps:  ## make deps                install what is missing (MPICH, oneDNN, nlohmann/json, xxHash)
	@launch/packages.sh install
detect:  ## make detect              look for GPUs, CUDA and NCCL again (CUDA_HOME= NCCL_HOME=)
	@rm -f build/detected.mk && $(MAKE) --no-print-directory help
clean:  ## make clean               remove build/
	rm -rf build

## BACKEND=cpu|cuda         overrides the backend that was found
## COMM=mpi                 with BACKEND=cuda: ranks share GPUs, host memory in place of NCCL
