# Threefold: `make` lists what there is. Everything that is built lives in build/<backend>/.
#   cpu/cpu.mk  what stands in for CUDA and NCCL     tests/tests.mk  tests, benchmarks and checks
#   `##` begins what help shows

MAKEFLAGS += -r# no rules but those below
.DEFAULT_GOAL := help

# ---- knobs

DATA    ?=# files to train on: text, or llm.c's .bin shards; without it this project's own sources
ARGS    ?=# more options for the program of `make run` or `make generate`
THREADS ?= $(shell nproc)
WERROR  ?=# -Werror (as .ci/run has it): another compiler's warnings do not stop a user

MPICXX    := $(firstword $(shell command -v mpicxx.mpich mpicxx 2>/dev/null) mpicxx)
NVCC      := $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc),nvcc)
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
PACKAGES  := mpich libmpich-dev libdnnl-dev nlohmann-json3-dev libxxhash-dev

# ---- which backend: GPUs that a compiled probe can see, else the CPU (BACKEND=cpu|cuda overrides)

ifndef BACKEND
-include build/detected.mk
endif
build/detected.mk:
	@mkdir -p build
	@printf '#include <cuda_runtime.h>\n#include <cublas_v2.h>\n#include <nccl.h>\nint main() { int n = 0, v; cublasHandle_t h; return cudaGetDeviceCount(&n) || n < 1 || cublasCreate(&h) || ncclGetVersion(&v); }\n' > build/detect.cu
	@if $(NVCC) build/detect.cu -o build/detect -lcublas -lnccl >/dev/null 2>&1 && build/detect; \
	  then echo 'BACKEND := cuda'; else echo 'BACKEND := cpu'; fi > $@
B := build/$(BACKEND)

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
NVCCFLAGS := -std=c++20 -O3 -lineinfo -I. -Ikernels -ccbin $(MPICXX) -Werror all-warnings \
             -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas -Xcompiler -Werror
GENCODE   := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
             -gencode arch=compute_90,code=compute_90
ifeq ($(BACKEND),cuda)
  CXXFLAGS += -I$(CUDA_HOME)/include
  LIBS     := -L$(CUDA_HOME)/lib64 -lcublas -lnccl -lxxhash -Xcompiler -fopenmp
  LINK     := $(NVCC) -ccbin $(MPICXX)
endif
include cpu/cpu.mk

# ---- probe: what the backend needs is there when a program that uses it compiles and links

USES := $(if $(filter cuda,$(BACKEND)),nccl.h cublas_v2.h,oneapi/dnnl/dnnl.h)
CALL := $(if $(filter cuda,$(BACKEND)),int v; cublasHandle_t h; return cublasCreate(&h) || ncclGetVersion(&v);,return dnnl_version() == 0;)
define probe
printf '$(foreach header,mpi.h nlohmann/json.hpp xxhash.h $(USES),#include <$(header)>\n)#ifndef MPICH_VERSION\n#error this MPI is not MPICH\n#endif\nint main() { MPI_Init(0, 0); $(CALL) }\n' > $(B)/probe.cpp && $(LINK) $(B)/probe.cpp -o $(B)/probe $(LIBS) 2>$(B)/probe.log
endef
$(B)/ready: Makefile cpu/cpu.mk
	@mkdir -p $(B)
	@{ $(probe); } || { $(MAKE) --no-print-directory deps && { $(probe); } } || { cat $(B)/probe.log; echo "make: the $(BACKEND) backend needs MPICH, nlohmann/json, xxHash and $(if $(filter cuda,$(BACKEND)),the CUDA Toolkit with cuBLAS and NCCL,oneDNN), and a program that uses them does not compile (above)"; exit 1; }
	@touch $@

# ---- rules

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

# COMM=mpi: ranks that share a GPU; cpu/nccl stages through host memory in place of NCCL
COMM  ?= nccl
WHERE := $(if $(filter cuda-mpi,$(BACKEND)-$(COMM)),/comm-mpi)
.SECONDEXPANSION:
$(PROGRAMS:%=$(B)/%): $(B)/%: $(B)/obj/$$(main_$$*).o $(OBJECTS)
	@$(LINK) $^ -o $@ $(LIBS)
$(PROGRAMS:%=$(B)/comm-mpi/%): $(B)/comm-mpi/%: $(B)/obj/$$(main_$$*).o $(OBJECTS) $(NCCL_CPU:%=$(B)/obj/%.o)
	@mkdir -p $(@D)
	@$(LINK) $^ -o $@ $(filter-out -lnccl,$(LIBS))
-include $(shell find build -name '*.d' 2>/dev/null)
.SECONDARY:

# ---- targets

.PHONY: help build built run generate deps clean
help:
	@echo "Threefold ($(BACKEND) backend)"
	@sed -nE 's/^([a-z].*)?## /  /p' $(filter %akefile %.mk,$(MAKEFILE_LIST))
	@tests/size.sh | sed 's/^/  /'

# ranks: one a core without a GPU (3d: 8), one a GPU with; STRATEGY=serial|replicate|fsdp|tp|pp|3d
NP       ?= $(if $(filter serial,$(STRATEGY)),1,$(if $(filter cuda,$(BACKEND)),$(or $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | wc -l)),1),$(if $(filter 3d,$(STRATEGY)),8,$(shell nproc))))
STRATEGY ?= replicate
ifneq ($(filter run generate,$(MAKECMDGOALS)),)
  ifeq ($(shell expr "$(NP)" : '[1-9][0-9]*$$'),0)
    $(error NP is '$(NP)', expected a number of ranks)
  endif
endif
LAYOUT   := $(if $(filter serial,$(STRATEGY)),,$(if $(filter 3d,$(STRATEGY)),--pp 2 --fsdp $(shell echo $$(($(NP) / 4))) --tp 2 --sequence-parallel,--$(STRATEGY) $(NP)))
unless = $(if $(filter $(1),$(ARGS)),,$(1) $(2))# an option that ARGS does not give
each = $(shell t=$$(($(THREADS) / $(1))); echo $$((t > 0 ? t : 1)))# threads of each of so many ranks
## make run [DATA=file] [STRATEGY=serial|replicate|fsdp|tp|pp|3d] [NP=ranks]
##                          train a GPT and print a sample of what it learned
run: built
	@case "$(STRATEGY)" in serial|replicate|fsdp|tp|pp) ;; 3d) [ $$(($(NP) % 4)) = 0 ] || { echo "make run: STRATEGY=3d is pp 2 x fsdp NP/4 x tp 2, but NP is $(NP): choose a multiple of 4"; exit 1; };; \
	  *) echo "make run: STRATEGY is '$(STRATEGY)', expected serial, replicate, fsdp, tp, pp or 3d"; exit 1;; esac
	OMP_NUM_THREADS=$(call each,$(NP)) $(if $(filter cuda,$(BACKEND)),,OMP_WAIT_POLICY=passive) \
	  mpiexec -n $(NP) build/train_gpt $(LAYOUT) $(if $(DATA),--data $(DATA)) $(call unless,--model,$(if $(filter cuda,$(BACKEND)),char,tiny)) $(call unless,--sample,400) $(call unless,--eval-every,100) $(ARGS)

# a checkpoint of its own, made on first use; two tensor parallel ranks unless NP says otherwise
CHECKPOINT ?= build/generate-model
PROMPT     ?=// tensor
export override PROMPT := $(value PROMPT)# through the environment, where no sign in it means anything
TP         := $(if $(filter file,$(origin NP)),$(if $(filter 1,$(NP)),1,2),$(NP))
## make generate [PROMPT=text] [CHECKPOINT=dir] [NP=ranks] [ARGS=options] [TRAIN_ARGS=options]
##                          continue a text with a trained model (trains one first, with TRAIN_ARGS, where there is none)
generate: built
	@ls "$(CHECKPOINT)/manifest.json" "$(CHECKPOINT)"/step-*/manifest.json 2>/dev/null | grep -q . || \
	  { echo "make generate: no model in $(CHECKPOINT) yet: training one"; $(MAKE) --no-print-directory run ARGS="--checkpoint $(CHECKPOINT) --resume $(TRAIN_ARGS)"; }
	OMP_NUM_THREADS=$(call each,$(TP)) $(if $(filter cuda,$(BACKEND)),,OMP_WAIT_POLICY=passive) \
	  mpiexec -n $(TP) build/generate --checkpoint $(CHECKPOINT) --prompt "$$PROMPT" --tp $(TP) $(ARGS)

build: $(PROGRAMS:%=$(B)$(WHERE)/%)  ## make build               compile the programs into build/
	@for p in $(PROGRAMS); do ln -sfn $(BACKEND)$(WHERE)/$$p build/$$p; done

built:  # for those who type no -j
	@$(MAKE) --no-print-directory -j$(THREADS) build

include tests/tests.mk

deps:  ## make deps                install what is missing (MPICH, oneDNN, nlohmann/json, xxHash)
	@mkdir -p build
	@if ! command -v apt-get >/dev/null; then echo "make deps: install MPICH, oneDNN, nlohmann/json and xxHash with this system's package manager (on Debian and Ubuntu: $(PACKAGES))"; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then sudo=sudo; \
	else echo "make deps: missing packages; as root run: apt-get update && apt-get install -y $(PACKAGES)"; exit 1; fi; \
	echo "make deps: installing $(PACKAGES)"; \
	$$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >build/apt.log 2>&1 || { tail -5 build/apt.log; exit 1; }

clean:  ## make clean               remove build/
	rm -rf build

## BACKEND=cpu|cuda         overrides the backend that was found
## COMM=mpi                 with BACKEND=cuda: ranks share GPUs, host memory in place of NCCL
