"""The mathematics of the methods: modules that know neither models nor Lightning."""
