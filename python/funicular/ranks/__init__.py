"""Several processes of one host that train one model: who they are, and how their gradients become one."""
