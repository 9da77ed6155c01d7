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
prepare: ## make all that the rest needs: a Debian tree, the kernel, its source (once; about 3.5 GB in the cache folder)
	@$(VM)/prepare

.PHONY: driver
ifdef KDIR
driver: ## build driver/hmm_gpu.ko; KDIR=<prepared kernel tree> for this host's own kernel, without the virtual machine
	$(MAKE) -C $(KDIR) M=$(CURDIR)/driver modules
else
driver: prepare
	@$(VM)/enter -- sh -c 'make -s -C "$$KDIR" KERNELRELEASE="$$KERNEL_RELEASE" M=/hmm-gpu/driver modules'
endif

.PHONY: debug-driver
debug-driver: ## build the driver for the checking kernel (target/debug-driver/hmm_gpu.ko)
	@$(VM)/prepare --debug
	@$(VM)/enter --debug -- sh -c 'cmp -s "$$KDIR/.config" target/debug-driver/kernel.config || rm -rf target/debug-driver; \
		mkdir -p target/debug-driver && cp "$$KDIR/.config" target/debug-driver/kernel.config && cd driver && \
		find . \( -name Kbuild -o -name "*.[ch]" -o -name "*.rs" -o -name "*.rules" \) ! -name "*_generated.rs" ! -name "*.mod.c" \
			-exec cp --parents --preserve=timestamps -t ../target/debug-driver {} + && \
		make -s -C "$$KDIR" M=/hmm-gpu/target/debug-driver modules'

.PHONY: userlib
userlib: prepare ## build the library, its header and the samples (target/tree/release, target/include)
	@$(VM)/enter -- sh -c 'CARGO_TARGET_DIR=target/tree cargo build --locked --release && mkdir -p target/include && \
		cbindgen --quiet --config userlib/cbindgen.toml --output target/include/hmm_gpu.h driver/uapi.rs'

.PHONY: demo
demo: driver userlib ## load the driver in the virtual GPU host, bind a GPU, move memory there and back, show it
	@$(VM)/run --timeout 120 -- bench/vm/demo

.PHONY: shell
shell: driver userlib ## a prompt in the virtual GPU host, with the driver loaded and the samples there
	@$(VM)/shell

.PHONY: test
test: ## everything that can be verified, on both kernels; ends in `N passed, N failed, N skipped`
	@bench/test

.PHONY: test-stock
test-stock: ## the part of it on Debian's kernel, and what needs no kernel
	@bench/test --stock

.PHONY: test-debug
test-debug: ## the other part: the guest's tests, on a kernel that checks (KASAN, lockdep, kmemleak and more; built once)
	@bench/test --debug

# How long each of them goes on, and where its numbers begin.
SECONDS ?= 600
SEED ?= $(shell date +%s)

.PHONY: soak
soak: ## the stress and the fuzzer for long, on the checking kernel: SECONDS=600 each; SEED=N for the one that was printed
	@HMM_GPU_STRESS_SECONDS=$(SECONDS) HMM_GPU_SEED=$(SEED) bench/test --debug guest_stress guest_fuzz

.PHONY: hmm-tests
hmm-tests: driver ## the kernel's own HMM suite on the driver and on the C module it was written for, side by side
	@bench/hmm-tests/run

.PHONY: bench-compare
bench-compare: driver userlib ## what the same calls cost on the driver and on that C module, by turns in one boot (some minutes)
	@$(VM)/enter -- bench/hmm-tests/build
	@$(VM)/run --timeout 1800 -- bench/compare/guest

.PHONY: clean
clean: ## remove what was built in this clone (the cache folder stays)
	rm -rf target driver/sys/*_generated.rs
	find driver \( -name '*.o' -o -name '*.ko' -o -name '*.mod' -o -name '*.mod.c' -o -name '.*.cmd' -o -name '*.d' \
		-o -name modules.order -o -name Module.symvers \) -delete

.PHONY: distclean
distclean: clean ## remove the cache folder too: Debian tree, kernel, downloaded packages
	rm -rf --one-file-system -- "$${XDG_CACHE_HOME:-$$HOME/.cache}/hmm-gpu"
