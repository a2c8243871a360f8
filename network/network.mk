# network.mk: several nodes on one machine.
#   nodes.sh   makes the nodes, and runs mpiexec over them

build/delay: network/delay.cpp
	@mkdir -p $(@D)
	@$(MPICXX) $(filter-out -I%,$(CXXFLAGS)) $< -o $@
