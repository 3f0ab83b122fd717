# The verbs of this repository; `make help` lists them. CARGO_TARGET_DIR is honoured.

CARGO ?= cargo
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
# Where tools that are built once are kept, by version.
TOOLS ?= $(HOME)/.cache/ambient-tools

DENY_VERSION := 0.20.2
DENY := $(TOOLS)/cargo-deny-$(DENY_VERSION)/bin/cargo-deny
# The programs of the test cluster: somebody's own, or those that we build.
CLUSTER_BUILT := $(TOOLS)/cluster-$(shell cat testing/cluster/version)
HELM := $(TOOLS)/helm-$(shell cat testing/cluster/helm/version)
KWOK := $(TOOLS)/kwok-$(shell cat testing/cluster/kwok/version)
CLUSTER := $(if $(KUBEBUILDER_ASSETS),$(abspath $(KUBEBUILDER_ASSETS)),$(CLUSTER_BUILT))
# Crates whose tests start a cluster.
CLUSTER_TESTS := ambient-control-plane ambient-testing

# Static binaries: no loader, so that they start in any image. Where there is no /dev/urandom,
# random numbers must come from the system call.
STATIC_TARGET ?= $(shell rustc -vV | sed -n 's/^host: //p')
STATIC_FLAGS := -C target-feature=+crt-static --cfg getrandom_backend="linux_getrandom"
STATIC_DIR := $(TARGET_DIR)/$(STATIC_TARGET)/dist
STATIC := ambient-runner ambient-sidecar
# Those of the servers have their own profile: quick before small.
SERVERS_DIR := $(TARGET_DIR)/$(STATIC_TARGET)/server
SERVERS := ambient-control-plane ambient-api-server

# What builds images by images/Dockerfile: docker, podman or buildah. Empty: our own archives.
BUILDER ?=
REGISTRY ?= images.example
VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)

# What `local` starts, or runs beside.
LOCAL := -p ambient-control-plane -p ambient-runner -p ambient-sidecar

.DEFAULT_GOAL := help
.PHONY: help build demo test e2e images lint fmt clippy deny chart static static-servers cluster-tools \
	cluster-programs bench bench-build bench-token bench-startup bench-memory bench-refresh soak

help: ## List the verbs.
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 20

build: ## Build the programs into target/debug.
	$(CARGO) build --locked --bins $(LOCAL) -p ambient-api-server

demo: ## Run a whole session on this machine, with tokens that live for seconds.
	$(CARGO) build --locked --bins $(LOCAL)
	"$(TARGET_DIR)/debug/ambient-control-plane" local --demo

# Before the tests, so that they fail with a sentence, or build what they need, only once.
NEEDS_CLUSTER := $(or $(if $(PACKAGE),,yes),$(filter $(CLUSTER_TESTS),$(PACKAGE)))

test: $(if $(NEEDS_CLUSTER),cluster-programs $(HELM)) ## Build everything and run all tests; PACKAGE=ambient-sidecar: those of one crate.
	KUBEBUILDER_ASSETS="$(CLUSTER)" HELM="$(HELM)/helm" $(CARGO) test --locked $(if $(PACKAGE),-p $(PACKAGE),--workspace) $(ARGS)

# On a node of this machine (as root), or on the cluster of E2E_KUBECONFIG; ARGS=NAME: only the
# scenarios with NAME in theirs. Built as for `make test`, so that after it nothing is built anew.
e2e: cluster-programs static static-servers $(HELM) ## Run sessions on a real kubelet, from POST to the end of their pods.
	$(CARGO) test --locked --workspace --no-run
	KUBEBUILDER_ASSETS="$(CLUSTER)" HELM="$(HELM)/helm" "$(TARGET_DIR)/debug/e2e" $(ARGS)

# BUILDER=docker REGISTRY=registry.example/ambient: by images/Dockerfile, ready to be pushed. Buildah
# alone has to be told that it may compile once for all of them.
ifeq ($(BUILDER),)
images: static static-servers ## Write all images to dist/images, as OCI archives; BUILDER=docker: build them.
	$(CARGO) build --locked -p ambient-testing --bin e2e
	"$(TARGET_DIR)/debug/e2e" --images dist/images
else
images:
	@command -v $(BUILDER) >/dev/null || { echo "there is no $(BUILDER); without BUILDER=…, make" \
		"images needs none" >&2; exit 1; }
	set -e; for name in $(STATIC) $(SERVERS); do \
		BUILDAH_LAYERS=true $(BUILDER) build --file images/Dockerfile --target "$$name" \
			--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) \
			--build-arg CREATED=$$(TZ=UTC0 git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ) \
			--build-arg SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
			--tag "$(REGISTRY)/$$name:$(VERSION)" .; \
	done
endif

lint: fmt clippy deny chart ## Formatting, clippy, licences and banned crates, the chart.

fmt:
	$(CARGO) fmt --all --check

clippy:
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

# With each set of values that its tests have.
chart: $(HELM)
	@for values in charts/ambient-control-plane/tests/*.values.yaml \
		charts/ambient-control-plane/examples/*.yaml; do \
		"$(HELM)/helm" lint --strict --quiet --values "$$values" charts/ambient-control-plane || { \
			echo "with $$values" >&2; exit 1; }; \
	done
	@echo "charts/ambient-control-plane: ok"

deny: $(DENY)
	"$(DENY)" --locked check licenses bans sources

$(DENY):
	env -u CARGO_TARGET_DIR $(CARGO) install cargo-deny --version $(DENY_VERSION) --locked \
		--root "$(TOOLS)/cargo-deny-$(DENY_VERSION)"

# Copies programs to dist, those that start where there is nothing else; $(1): from, $(2): which.
define to_dist
	@mkdir -p dist
	@for name in $(2); do \
		binary="$(1)/$$name"; \
		if readelf --program-headers --wide "$$binary" | grep -q INTERP; then \
			echo "$$name asks for a loader, so it would not start in other people's images" >&2; \
			exit 1; \
		fi; \
		if readelf --dynamic --wide "$$binary" | grep NEEDED >&2; then \
			echo "$$name needs the shared libraries above" >&2; \
			exit 1; \
		fi; \
		cp "$$binary" "dist/.$$name" && mv "dist/.$$name" "dist/$$name" || exit 1; \
		echo "dist/$$name: static, $$(stat -c %s "dist/$$name") bytes"; \
	done
endef

static: ## Write dist/ambient-runner and dist/ambient-sidecar, which run in any image.
	RUSTFLAGS='$(STATIC_FLAGS)' $(CARGO) build --locked --profile dist --bins \
		--target $(STATIC_TARGET) $(STATIC:%=-p %)
	$(call to_dist,$(STATIC_DIR),$(STATIC))

static-servers: ## Write dist/ambient-control-plane and dist/ambient-api-server, likewise.
	RUSTFLAGS='$(STATIC_FLAGS)' $(CARGO) build --locked --profile server --bins \
		--target $(STATIC_TARGET) $(SERVERS:%=-p %)
	$(call to_dist,$(SERVERS_DIR),$(SERVERS))

cluster-tools: cluster-programs $(HELM) $(KWOK) ## Build Kubernetes, helm and kwok for tests and benchmarks, once; needs Go.

# All that `make test` needs: with KUBEBUILDER_ASSETS nothing is built.
cluster-programs: $(if $(KUBEBUILDER_ASSETS),,$(CLUSTER_BUILT))
	@for name in etcd kube-apiserver kube-controller-manager kubectl; do \
		[ -x "$(CLUSTER)/$$name" ] || { \
			echo "$$name is not in $(CLUSTER): put it there, or unset KUBEBUILDER_ASSETS to" \
				"have it built" >&2; exit 1; }; \
	done

$(CLUSTER_BUILT):
	testing/cluster/build.sh "$@" cluster

$(HELM):
	testing/cluster/build.sh "$@" helm

$(KWOK):
	testing/cluster/build.sh "$@" kwok

bench: bench-token bench-startup bench-memory ## Measure; docs/benchmarks.md records it.

bench-build:
	$(CARGO) build --locked --release --workspace --bins

bench-token: bench-build ## Token exchanges per second, and good clients among garbage.
	"$(TARGET_DIR)/release/bench-token" $(ARGS)

bench-startup: bench-build static ## Runner start to token in hand.
	"$(TARGET_DIR)/release/bench-startup" --static-dir dist $(ARGS)

bench-memory: bench-build static ## Resident memory of each program at rest.
	"$(TARGET_DIR)/release/bench-memory" --static-dir dist $(ARGS)

# ARGS="--sessions 1000": a small one. Not part of `make bench`, as it takes half an hour.
bench-refresh: bench-build cluster-programs $(KWOK) ## The control plane with 10,000 running sessions on a real Kubernetes API.
	KUBEBUILDER_ASSETS="$(CLUSTER)" KWOK="$(KWOK)/kwok" "$(TARGET_DIR)/release/bench-refresh" $(ARGS)

# ARGS="--minutes 3 --seed 1": a short one, with the faults of that seed.
soak: bench-build cluster-programs $(KWOK) ## Sessions come and go for half an hour while everything around the control plane fails.
	KUBEBUILDER_ASSETS="$(CLUSTER)" KWOK="$(KWOK)/kwok" "$(TARGET_DIR)/release/soak" $(ARGS)
