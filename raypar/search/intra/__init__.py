"""How the ops of one stage are sharded over its mesh: an integer program (`planner.plan_intra`)."""
