from fuzz_adapters import campaign
