"""Digital phantoms, the virtual scanner, the virtual sequence controller, closed-loop studies."""
