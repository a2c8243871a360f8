# tests.mk: the test programs, the benchmarks, and everything that checks the project.

TESTS      := $(patsubst tests/%.cpp,%,$(sort $(wildcard tests/test_*.cpp)))
# all but those of cpu/ and those that use no device
CUDA_TESTS := $(filter-out %_cpu %_nccl %_comm %_schedule %_support %_fuzz %_plan,$(TESTS))
BENCHES    := $(patsubst tests/%.cpp,%,$(sort $(wildcard tests/bench_*.cpp)))

$(B)/obj/tests/%: private CXXFLAGS += -O1# compiling takes longer than running, but for -O0
$(B)/tests/test_cpu: $(B)/obj/tests/cpu_kernels.cu.o
$(B)/tests/libfaults.so: tests/faults.cpp
	@mkdir -p $(@D)
	$(Q)$(MPICXX) -std=c++20 -shared -fPIC -O1 -Wall -Wextra $< -o $@ -ldl

# the listings of the strategies' pages, each the first C++ block of its page
LISTINGS := $(patsubst %,$(B)/gen/%.listing,fsdp tensor_parallel pipeline context_parallel)
$(B)/gen/%.listing: docs/%.md
	@mkdir -p $(@D)
	@awk '/^```/ { if (inside) exit; inside = /cpp/; line = FNR + 1; next } \
	  inside { if (line) print "#line " line " \"$<\""; line = 0; print }' $< >$@
$(B)/obj/tests/listings.cpp.o: private CXXFLAGS += -I$(B)/gen
$(B)/obj/tests/listings.cpp.o: $(LISTINGS)

# The CUDA build without a GPU: the objects of BACKEND=cuda, linked with the CUDA runtime in
# LIBCUDART=dir, which runs PTX, and with cpu/ in place of cuBLAS and NCCL.
PTX_CPU := cpu/cuda/cublas.cpp tests/ptx_extra.cpp $(NCCL_CPU)
$(B)/obj/cpu/cuda/cublas.cpp.o: private CXXFLAGS += -fopenmp
$(B)/ptx/%: $$(main) $(OBJECTS) $(PTX_CPU:%=$(B)/obj/%.o)
	@mkdir -p $(@D)
	$(Q)$(LINK) $^ -o $@ -cudart none -L$(LIBCUDART) -lfakecudart -Xlinker -rpath=$(LIBCUDART) \
	  -ldnnl -lxxhash -Xcompiler -fopenmp

# The same with a device that computes nothing, to count what the host asks of it.
$(B)/null/%: $$(main) $(OBJECTS) $(B)/obj/tests/null_device.cpp.o
	@mkdir -p $(@D)
	$(Q)$(LINK) $^ -o $@ -cudart none $(CUDA_LIBS) -lxxhash $(LIBS_NCCL) -Xcompiler -fopenmp

# what tests/mutants.sh compiles and links with
print-compile: ; @echo '$(MPICXX) $(CXXFLAGS)'
print-link: ; @echo '$(LINK)'
print-objects: ; @echo '$(OBJECTS)'

.PHONY: test faults fuzz parity compare mutants sanitize check-docs check-style check-portable
.PHONY: check-book check-pages
.PHONY: bench gpu-check cuda cuda-build check-spills sass

test:  ## make test                the whole suite; with BACKEND=cuda on the GPUs, too
	@tests/run.sh cpu faithful $(filter cuda,$(BACKEND))

faults: build  ## make faults [FAULTS=20] [KILLS=50]
##                          random calls that fail, random kills: what was saved stays
	@tests/test_faults.sh $(or $(FAULTS),20) $(or $(KILLS),50)

SECONDS ?= 60
fuzz:  ## make fuzz [SECONDS=60]   libFuzzer on everything that reads files of others (needs clang)
	@tests/fuzz.sh $(SECONDS)

mutants:  ## make mutants             one-line faults that the suite must catch
	@$(MAKE) -s --no-print-directory BACKEND=cpu \
	  $$(grep -oE '\btest_[a-z_]+' tests/mutants.sh | sort -u | sed 's,^,build/cpu/tests/,')
	@tests/mutants.sh
	@tests/kernel_mutants.sh

## make parity              every layout of up to 8 ranks against one rank, in f64: one table
parity: $(B)/tests/test_parity
	@tests/parity.sh $(BACKEND)

## make compare [ONLY=pp]   all strategies side by side: tables and build/report.html
compare: built
	@$(MAKE) --no-print-directory $(B)/tests/compare
	@tests/compare.sh

sanitize:  ## make sanitize            small tests under Address- and UndefinedBehaviorSanitizer
	@tests/sanitize.sh

check-docs: built  ## make check-docs          runs the commands that the docs show, looks up names
	@tests/check_docs.sh

## make check-book          makes the book, and follows its links and names
check-book:
	@tests/check_book.sh

check-style:  ## make check-style         width, clang-format, one sentence a line, includes
	@tests/check_style.sh

## make check-pages         drives a replay of each strategy in Chromium (where it is installed)
check-pages: built
	@BACKEND=$(BACKEND) THREADS=$(THREADS) MPIEXEC='$(MPIEXEC)' tests/check_pages.sh

## make check-portable      other systems, as root on Debian: ON=trixie|arm64|clang (all three)
check-portable:
	@tests/portable.sh $(ON)

## make bench               speed: kernels, tokens/s, memory
bench: build $(BENCHES:%=$(B)$(WHERE)/tests/%)
	@tests/bench.sh

## make gpu-check           whether all holds on this machine's GPUs: build/gpu-check.txt
gpu-check:
	@MPIEXEC='$(MPIEXEC)' MPICXX='$(MPICXX)' LIBCUDART='$(LIBCUDART)' tests/gpu_check.sh

## make cuda                compile and link everything with nvcc, cuBLAS and NCCL (needs no GPU)
cuda:
	@$(MAKE) --no-print-directory BACKEND=cuda cuda-build check-spills sass
cuda-build: $(PROGRAMS:%=$(B)/%) $(B)/comm-mpi/train_gpt \
            $(patsubst %,$(B)/tests/%,$(CUDA_TESTS) $(BENCHES) compare)
# ptxas spills registers, or keeps an array out of them, in no kernel but those for f64, which are
# for proofs. Of chips after sm_90 this is only said: nobody has tuned for them here.
check-spills: cuda-build
	@cat $(B)/obj/*.ptxas $(B)/obj/*/*.ptxas | awk -v built_for='$(GENCODE)' ' \
	  /Compiling entry function/ { name = $$7; known = /sm_(8.|90)/; kernels++ } \
	  /bytes stack frame/ && ($$1 > 0 || $$5 > 0) && name !~ /[IE](f|13__nv_bfloat16)*d/ { \
	    print "spills:", name, $$0; \
	    bad += known \
	  } \
	  END { \
	    print kernels " kernels compiled for " built_for \
	      "; spills or stack frames outside f64: " (bad ? "yes" : "none"); \
	    exit bad > 0 || !kernels \
	  }'
# the machine code of the kernels that multiply in tensor cores
sass: cuda-build
	@CUDA_HOME=$(CUDA) tests/sass.sh $(patsubst %,$(B)/obj/kernels/%.cu.o,attention_mma matmul)
