# hmm-gpu: every task by name. `make help` lists them.

VM := bench/vm
# The Debian kernel series that is run and built for.
SERIES ?= 7.3
export SERIES

.DEFAULT_GOAL := help

.PHONY: help
help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: prepare
prepare: ## make all that the rest needs: a Debian tree, the kernel, its source (once; about 3 GB in the cache folder)
	$(VM)/prepare

.PHONY: driver
ifdef KDIR
driver: ## build driver/hmm_gpu.ko; KDIR=<prepared kernel tree> for this host's own kernel, without the virtual machine
	$(MAKE) -C $(KDIR) M=$(CURDIR)/driver modules
else
driver: prepare
	$(VM)/enter -- sh -c 'make -s -C "$$KDIR" KERNELRELEASE="$$KERNEL_RELEASE" M=/hmm-gpu/driver modules'
endif

.PHONY: userlib
userlib: prepare ## build the library, its header and the samples (target/tree/release, target/include)
	$(VM)/enter -- sh -c 'CARGO_TARGET_DIR=target/tree cargo build --locked --release && mkdir -p target/include && \
		cbindgen --quiet --config userlib/cbindgen.toml --output target/include/hmm_gpu.h driver/uapi.rs'
