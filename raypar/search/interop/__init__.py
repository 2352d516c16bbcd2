"""Where to cut a model into stages and which devices each one gets (Zheng et al. 2022, "Alpa")."""
