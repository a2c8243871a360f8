# cpu.mk: the backends in which cpu/ stands in for CUDA, cuBLAS or NCCL.
#   cpu       one thread a block (FAST); FAST has its own form of two headers of kernels/
#   faithful  the same with every CUDA thread a fiber (FAITHFUL), for tests
#   sanitize  as cpu, under Address- and UndefinedBehaviorSanitizer, for tests

NCCL_CPU := $(sort $(wildcard cpu/nccl/*.cpp))
STANDIN  := $(filter cpu faithful sanitize,$(BACKEND))
MARCH    ?= native# the processor that the CPU build is for
WIDE      = $(if $(findstring x86_64,$(shell $(MPICXX) -dumpmachine)),-mprefer-vector-width=512)
KERNEL_FAST = -O3 $(WIDE) -fno-math-errno -fno-trapping-math \
              -fno-signed-zeros -fassociative-math -ffinite-math-only

ifeq ($(BACKEND),cpu)
  CXXFLAGS += -DCPU_FAST
else ifeq ($(BACKEND),sanitize)
  CXXFLAGS += -DCPU_FAST -O1 -fno-omit-frame-pointer \
              -fsanitize=address,undefined -fno-sanitize-recover=undefined
  KERNEL_FAST :=
  LIBS     := -fsanitize=address,undefined
else ifeq ($(BACKEND),faithful)
  CXXFLAGS += -DCPU_FAITHFUL
  KERNEL_FAST :=
  SOURCES  := $(filter %.cu autograd.cpp gpt.cpp optimizer.cpp comm.cpp \
                tensor_parallel.cpp context_parallel.cpp support/recorder.cpp, $(SOURCES))
  SOURCES  += cpu/faithful/faithful.cpp
else ifneq ($(BACKEND),cuda)
  $(error BACKEND is '$(BACKEND)', expected cpu or cuda)
endif
LINK ?= $(MPICXX)
$(B)/obj/cpu/nccl/%: private CXXFLAGS += -O2# sums of what ranks have

ifneq ($(STANDIN),)
  CXXFLAGS += $(if $(filter faithful,$(BACKEND)),-Ikernels -Icpu/cuda,-Icpu/cuda -Ikernels) \
              -Icpu/nccl -march=$(MARCH) -fopenmp
  SOURCES  += cpu/cuda/runtime.cpp cpu/cuda/cublas.cpp $(NCCL_CPU)
  # a function that is looked up at its first call needs more stack than a thread may have
  LIBS     += -ldnnl -lxxhash -fopenmp -Wl,-z,now

$(B)/gen/%.cu.cpp: %.cu cpu/cuda/launch.sed | $(B)/ready
	@mkdir -p $(@D)
	@{ printf '#line 1 "%s"\n' $<; sed -z -E -f cpu/cuda/launch.sed $<; } > $@
$(B)/obj/%.cu.o: $(B)/gen/%.cu.cpp | $(B)/ready
	@mkdir -p $(@D)
	@echo "  $(BACKEND)  $*.cu"
	$(Q)$(MPICXX) $(CXXFLAGS) $(KERNEL_FAST) -MMD -MP -c $< -o $@
endif
