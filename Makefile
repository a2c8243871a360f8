# Threefold: `make` lists what there is. Everything that is built lives in build/<backend>/.
#   launch/launch.mk    which backend, what has to be installed, make run
#   cpu/cpu.mk          what stands in for CUDA and NCCL
#   network/network.mk  several nodes on one machine
#   tests/tests.mk      tests, benchmarks and checks
#   `##` begins what help shows

MAKEFLAGS += -r# no rules but those below
unexport CDPATH# in which a script's `cd launch/..` would look
.DEFAULT_GOAL := help

ifneq ($(shell uname -s),Linux)
  $(error Threefold runs on Linux alone: elsewhere use a Linux container (--shm-size=1g) or WSL 2)
endif
# A misspelled variable would do nothing. Known is what a makefile or a script names, in capitals,
# and what packagers give to every make.
$(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$(if $(shell \
  { echo INSTALL SHELL; cat Makefile */*.mk */*.sh; } | \
    grep -ow '[A-Z_0-9]*' | grep -xm1 '$v'),,$(error there is no variable $v: make lists them))))
# these would do nothing, too, or take the place of the project's own
$(foreach v,CC CXX CPPFLAGS CFLAGS CXXFLAGS LDFLAGS,$(if $(findstring command line,$(origin $v)),\
  $(error $v cannot be given: MPICH_CXX=clang++ make chooses the compiler, OPTIMIZE= and MARCH= \
    its flags)))

# ---- knobs

THREADS ?= $(shell env -u OMP_NUM_THREADS nproc)
ifneq ($(shell echo '$(THREADS)' | grep -xc '[1-9][0-9]*'),1)
  $(error THREADS is '$(THREADS)', expected a whole number from 1)
endif
WERROR  ?=# -Werror (as .ci/run has it): another compiler's warnings do not stop a user
OPTIMIZE ?= -O1 -g1# of what is no kernel: -O2 compiles longer and runs no faster
COMM    ?= nccl
Q        = $(if $(filter-out 0,$(V) $(VERBOSE)),,@)
ifeq ($(filter nccl mpi,$(COMM)),)
  $(error COMM is '$(COMM)', expected nccl or mpi)
endif
# MPICH, though another MPI may be there; looked for at each use, since `make deps` may come first
MPICXX  ?= $(or $(shell command -v mpicxx.mpich 2>/dev/null),mpicxx)
MPIEXEC ?= $(if $(findstring mpicxx,$(MPICXX)),$(subst mpicxx,mpiexec,$(MPICXX)),mpiexec)

include launch/launch.mk

# ---- sources: a folder a concern; the files with a main() are the programs

FOLDERS := launch theory report inference checkpoint support
PROGRAMS := train_gpt generate checkpoint show_schedule plan
main_train_gpt     := train_gpt.cpp
main_generate      := inference/generate.cpp
main_checkpoint    := checkpoint/tool.cpp
main_show_schedule := report/show_schedule.cpp
main_plan          := report/show_plan.cpp
MAINS    := $(foreach program,$(PROGRAMS),$(main_$(program)))
SOURCES  := tensor.cu $(sort $(wildcard kernels/*.cu)) \
            $(filter-out $(MAINS),$(sort $(wildcard *.cpp $(FOLDERS:%=%/*.cpp))))

# ---- compilers: here for CUDA; cpu/cpu.mk changes them for the backends that stand in for it

CXXFLAGS  := -std=c++20 $(OPTIMIZE) -Wall -Wextra $(WERROR) -Wno-unknown-pragmas -I. \
             -idirafter cpu/nvtx# where CUDA has none
NVCCFLAGS  = -std=c++20 $(filter -O%,$(OPTIMIZE)) -lineinfo -I. -Ikernels -ccbin $(MPICXX) \
             -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas \
             $(if $(WERROR),-Werror all-warnings -Xcompiler -Werror)
# with PTX for newer GPUs, and for a PTX runner, which takes the first that it finds uncompressed
GENCODE   := -gencode arch=compute_80,code=[compute_80,sm_80] \
             -gencode arch=compute_90,code=sm_90 -no-compress
ifneq ($(GPU_GENCODE),)
  GENCODE := $(GPU_GENCODE)
endif
ifeq ($(BACKEND),cuda)
  CXXFLAGS += -I$(CUDA_INCLUDE) $(NCCL_FLAGS) $(if $(filter mpi,$(COMM)),-idirafter cpu/nccl)
  LIBS      = $(CUDA_LIBS) -lcublas -lxxhash -Xcompiler -fopenmp
  LIBS_NCCL = $(NCCL_LIBS)
  LINK      = $(NVCC) -ccbin $(MPICXX)
endif
include cpu/cpu.mk

# ---- rules

OBJECTS = $(patsubst %,$(B)/obj/%.o,$(SOURCES))
ifeq ($(STANDIN),)
$(B)/obj/%.cu.o: %.cu | $(B)/ready
	@mkdir -p $(@D)
	@echo "  $(BACKEND)  $<"
	$(Q)$(NVCC) $(NVCCFLAGS) $(GENCODE) -Xptxas -v -MMD -MP -c $< -o $@ 2>$(@:.o=.ptxas) || \
	  { cat $(@:.o=.ptxas); exit 1; }
endif
# (after `|`: an edit of this file alone compiles nothing again; other flags begin with make clean)
$(B)/obj/%.cpp.o: %.cpp | $(B)/ready
	@mkdir -p $(@D)
	@echo "  $(BACKEND)  $<"
	$(Q)$(MPICXX) $(CXXFLAGS) -MMD -MP -c $< -o $@

# with COMM=mpi ranks share a GPU; cpu/nccl stages through host memory in place of NCCL
WHERE := $(if $(filter cuda-mpi,$(BACKEND)-$(COMM)),/comm-mpi)
main   = $(B)/obj/$(or $(main_$*),$*.cpp).o# of the program $*
.SECONDEXPANSION:
$(patsubst %,$(B)/%,$(PROGRAMS) $(basename $(wildcard tests/*.cpp))): $(B)/%: $$(main) $(OBJECTS)
	@mkdir -p $(@D)
	$(Q)$(LINK) $^ -o $@ $(LIBS) $(LIBS_NCCL)
$(B)/comm-mpi/%: $$(main) $(OBJECTS) $(NCCL_CPU:%=$(B)/obj/%.o)
	@mkdir -p $(@D)
	$(Q)$(LINK) $^ -o $@ $(LIBS)
# of this backend: others may have whole systems in build/ (make check-portable)
-include $(shell find $(B) -type f -name '*.d' 2>/dev/null)
.SECONDARY:
.DELETE_ON_ERROR:

# ---- targets

.PHONY: help programs build built book clean
help:
	@echo 'Threefold ($(BACKEND) backend)$(if $(WHY),; no GPU is used: $(WHY))'
	@sed -nE 's/^([a-z].*)?## /  /p' launch/launch.mk Makefile network/network.mk tests/tests.mk
	@tests/size.sh | sed 's/^/  /'

programs: $(PROGRAMS:%=$(B)$(WHERE)/%)  # of this backend; build/ keeps those that it has
build: programs  ## make build               compile the programs into build/
	@for p in $(PROGRAMS); do [ "$$(readlink build/$$p)" = $(BACKEND)$(WHERE)/$$p ] || \
	  ln -sfn $(BACKEND)$(WHERE)/$$p build/$$p || exit 1; done
$(PROGRAMS:%=build/%): build  # make build/plan, after an edit
built:  # for those who type no -j
	@$(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j$(THREADS)) build

book:  ## make book                docs/ beside the code: build/book/index.html
	@docs/book/book.sh

include network/network.mk
include tests/tests.mk

clean:  ## make clean               remove build/
	rm -rf build

## BACKEND=cpu|cuda         overrides the backend that was found
## V=1                      shows the commands that compile and link
## COMM=mpi                 with BACKEND=cuda: ranks share GPUs, host memory in place of NCCL
