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
prepare: ## make all that the rest needs: a Debian tree, the kernel, its source (once; about 5.5 GB in the cache folder, where `make test` leaves 2 GB of built crates too)
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
		cbindgen --quiet --config userlib/cbindgen.toml --output target/include/hmm_gpu.h driver/uapi.rs && \
		for sample in samples/c/*.c; do \
			gcc -std=gnu11 -O2 -Wall -Wextra -Werror -I target/include -o "target/tree/release/$$(basename "$$sample" .c)" "$$sample" || exit; \
		done'

.PHONY: tool
tool: ## build hmmctl with this host's own cargo (1.85 or later), without the virtual machine (target/release/hmmctl)
	cargo build --locked --release --package hmmctl

# Where things are installed. Packages set DESTDIR; RELEASE is the kernel that the module in driver/ was built for.
PREFIX ?= /usr/local
RULES ?= /usr/lib/udev/rules.d
HMMCTL ?= $(firstword $(wildcard target/release/hmmctl target/tree/release/hmmctl))
RELEASE ?= $(firstword $(shell modinfo -F vermagic driver/hmm_gpu.ko 2>/dev/null))
SHARE := $(DESTDIR)$(PREFIX)/share
COMPLETIONS := $(SHARE)/bash-completion/completions/hmmctl $(SHARE)/zsh/site-functions/_hmmctl $(SHARE)/fish/vendor_completions.d/hmmctl.fish

.PHONY: install
install: ## install what was built: module, udev rule, hmmctl, its manual pages and completions; DESTDIR, PREFIX (nothing is loaded)
	@test -n "$(RELEASE)" || { echo "there is no driver/hmm_gpu.ko: make driver KDIR=..." >&2; exit 1; }
	@test -n "$(HMMCTL)" || { echo "there is no hmmctl: make tool" >&2; exit 1; }
	install -D -m 644 driver/hmm_gpu.ko "$(DESTDIR)/lib/modules/$(RELEASE)/updates/hmm_gpu.ko"
	install -D -m 644 driver/90-hmm-gpu.rules "$(DESTDIR)$(RULES)/90-hmm-gpu.rules"
	install -D -m 755 "$(HMMCTL)" "$(DESTDIR)$(PREFIX)/sbin/hmmctl"
	@set -e; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; for what in man bash zsh fish; do "$(HMMCTL)" generate $$what "$$new"; done; \
		for page in "$$new"/*.1; do install -D -m 644 "$$page" "$(SHARE)/man/man1/$$(basename "$$page")"; done; \
		install -D -m 644 "$$new/hmmctl.bash" "$(word 1,$(COMPLETIONS))"; \
		install -D -m 644 "$$new/_hmmctl" "$(word 2,$(COMPLETIONS))"; \
		install -D -m 644 "$$new/hmmctl.fish" "$(word 3,$(COMPLETIONS))"
	$(if $(DESTDIR),,depmod "$(RELEASE)" && udevadm control --reload)

.PHONY: uninstall
uninstall: ## remove what install has put there, of this kernel release
	rm -f "$(DESTDIR)$(RULES)/90-hmm-gpu.rules" "$(DESTDIR)$(PREFIX)/sbin/hmmctl" $(foreach file,$(COMPLETIONS),"$(file)")
	rm -f "$(SHARE)"/man/man1/hmmctl.1 "$(SHARE)"/man/man1/hmmctl-*.1
	$(if $(RELEASE),rm -f "$(DESTDIR)/lib/modules/$(RELEASE)/updates/hmm_gpu.ko")
	$(if $(DESTDIR)$(if $(RELEASE),,no module),,depmod "$(RELEASE)")

.PHONY: doc
doc: driver ## build the book of Documentation/ and what the crate and the module say of themselves (target/doc)
	@$(VM)/enter -- bench/doc

.PHONY: shaders
shaders: prepare ## compile the library's shaders (userlib/shaders/*.spv), which are kept in the repository
	@$(VM)/enter -- userlib/shaders/build

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

.PHONY: bench
bench: driver ## benchmarks in the virtual GPU host, with the C module beside: target/bench/index.html and summary.json
	@bench/bench

.PHONY: bench-quick
bench-quick: driver ## little of each, in under five minutes
	@BENCH_QUICK=1 bench/bench

.PHONY: bench-host
bench-host: ## the same on this host, where the driver is loaded, without the C module (BENCH_ONLY='migration faults')
	@bench/bench --host

.PHONY: bench-compare
bench-compare: driver ## what the same calls cost on the driver and on that C module, by turns in one boot: target/bench-compare (some minutes)
	@BENCH_OUT=target/bench-compare BENCH_ONLY=compare bench/bench

.PHONY: bench-instructions
bench-instructions: driver ## the same in instructions, which are as many on any machine: target/bench-instructions
	@BENCH_OUT=target/bench-instructions BENCH_ONLY=compare bench/bench --icount

.PHONY: clean
clean: ## remove what was built in this clone (the cache folder stays)
	rm -rf target driver/sys/*_generated.rs
	find driver \( -name '*.o' -o -name '*.ko' -o -name '*.mod' -o -name '*.mod.c' -o -name '.*.cmd' -o -name '*.d' \
		-o -name modules.order -o -name Module.symvers \) -delete

.PHONY: distclean
distclean: clean ## remove the cache folder too: Debian tree, kernel, downloaded packages
	rm -rf --one-file-system -- "$${XDG_CACHE_HOME:-$$HOME/.cache}/hmm-gpu"
