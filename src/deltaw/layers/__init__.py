"""One dense layer: how W0 reads as [d, k], how its class is patched and given back, which adapter a row goes through."""
