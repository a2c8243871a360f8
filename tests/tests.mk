# tests.mk: the test programs, the benchmarks, and everything that checks the project.

TESTS      := $(patsubst tests/%.cpp,%,$(sort $(wildcard tests/test_*.cpp)))
CUDA_TESTS := $(filter-out test_cpu test_nccl test_comm,$(TESTS))
BENCHES    := $(patsubst tests/%.cpp,%,$(sort $(wildcard tests/bench_*.cpp)))

$(B)/tests/%: $(B)/obj/tests/%.cpp.o $(OBJECTS)
	@mkdir -p $(@D)
	@$(LINK) $^ -o $@ $(LIBS)
$(B)/comm-mpi/tests/%: $(B)/obj/tests/%.cpp.o $(OBJECTS) $(NCCL_CPU:%=$(B)/obj/%.o)
	@mkdir -p $(@D)
	@$(LINK) $^ -o $@ $(filter-out -lnccl,$(LIBS))
$(B)/tests/test_cpu: $(B)/obj/tests/cpu_kernels.cu.o
$(B)/tests/libfaults.so: tests/faults.cpp
	@mkdir -p $(@D)
	@$(MPICXX) -shared -fPIC -O1 -Wall -Wextra $< -o $@ -ldl

# what tests/mutants.sh compiles and links with
print-compile: ; @echo '$(MPICXX) $(CXXFLAGS)'
print-link: ; @echo '$(LINK)'
print-objects: ; @echo '$(OBJECTS)'

.PHONY: test faults parity compare mutants sanitize check-docs bench cuda cuda-build check-spills

test:  ## make test                the whole suite
	@tests/run.sh

faults: build  ## make faults [FAULTS=20] [KILLS=50]
##                          random calls that fail, random kills: what was saved stays
	@tests/test_faults.sh $(or $(FAULTS),20) $(or $(KILLS),50)

mutants:  ## make mutants             one-line faults that the suite must catch
	@$(MAKE) -s --no-print-directory BACKEND=cpu $(patsubst %,build/cpu/tests/test_%,fsdp tensor_parallel pipeline schedule comm golden)
	@tests/mutants.sh

parity: $(B)/tests/test_parity  ## make parity              every layout of up to 8 ranks against one rank, in f64: one table
	@tests/parity.sh $(BACKEND)

compare: built $(B)/tests/compare  ## make compare [ONLY=pp]   all strategies side by side: tables and build/report.html
	@tests/compare.sh

sanitize:  ## make sanitize            small tests under Address- and UndefinedBehaviorSanitizer
	@tests/sanitize.sh

check-docs: built  ## make check-docs          runs the commands that the docs show, looks up the names they use
	@tests/check_docs.sh

bench: build $(BENCHES:%=$(B)/tests/%)  ## make bench               speed: kernels, tokens/s, memory
	@tests/bench.sh

cuda:  ## make cuda                compile and link everything with nvcc, cuBLAS and NCCL (needs no GPU)
	@$(MAKE) --no-print-directory BACKEND=cuda cuda-build check-spills
cuda-build: $(PROGRAMS:%=$(B)/%) $(CUDA_TESTS:%=$(B)/tests/%) $(B)/comm-mpi/train_gpt
# ptxas spills registers, or keeps an array out of them, in no kernel but those for f64, which are
# for proofs
check-spills: cuda-build
	@cat $(B)/obj/*.ptxas $(B)/obj/*/*.ptxas | awk '/Compiling entry function/ { name = $$7; kernels++ } \
	  /bytes stack frame/ { if (($$1 > 0 || $$5 > 0) && name !~ /I(f|13__nv_bfloat16)*d/) { print "spills:", name, $$0; bad = 1 } } \
	  END { print kernels " kernels compiled for " "$(GENCODE)" "; spills or stack frames outside f64: " (bad ? "yes" : "none"); exit bad }'
