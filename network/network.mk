# network.mk: several nodes on one machine.
#   nodes.sh   makes the nodes, and runs mpiexec over them        experiment.sh   make network

.PHONY: network
build/delay: network/delay.cpp support/check.h
	@mkdir -p $(@D)
	$(Q)$(MPICXX) $(filter-out -I%,$(CXXFLAGS)) -I. $< -o $@
## make network             the strategies over links made slow, predicted and measured (root)
network:
	@$(MAKE) -s --no-print-directory BACKEND=cpu programs build/delay build/cpu/tests/bench_links
	@network/experiment.sh
