# network.mk: several nodes on one machine.
#   nodes.sh   makes the nodes, and runs mpiexec over them        experiment.sh   make network

.PHONY: network
build/delay: network/delay.cpp
	@mkdir -p $(@D)
	@$(MPICXX) $(filter-out -I%,$(CXXFLAGS)) $< -o $@
network: built build/delay  ## make network             the strategies over links made slow (root)
	@network/experiment.sh
