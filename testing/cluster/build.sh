#!/usr/bin/env bash
# Builds programs that the tests start, static, into one folder.
#   build.sh FOLDER [cluster|helm|kwok]
# The folder appears when all of it is there, never a part.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?a folder is needed}
what=${2:-cluster}

command -v go >/dev/null || {
	echo "Go is needed to build the programs of the test cluster: install it (go.dev), or set" \
		"KUBEBUILDER_ASSETS to a folder with etcd, kube-apiserver, kube-controller-manager and" \
		"kubectl" >&2
	exit 1
}

mkdir -p "$(dirname "$folder")"
new=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$new"' EXIT

build() { # module, package, binary, further linker flags
	echo "building $3: some minutes on the first run" >&2
	local started=$SECONDS
	(cd "$here/$1" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w ${4-}" -o "$new/$3" "$2")
	echo "built $3 in $((SECONDS - started)) s" >&2
}

case $what in
cluster)
	build etcd . etcd
	build coredns . coredns
	# Kubernetes refuses to start without its version.
	kubernetes=$(sed -nE 's|^\s+k8s.io/kubernetes (v[0-9.]+)$|\1|p' "$here/kubernetes/go.mod")
	[ "$kubernetes" ] || { echo "no version of k8s.io/kubernetes in its go.mod" >&2; exit 1; }
	version=k8s.io/component-base/version
	build kubernetes . kubernetes "-X $version.gitVersion=$kubernetes -X $version.gitMajor=1 \
		-X $version.gitMinor=$(cut -d. -f2 <<<"$kubernetes") -X $version.gitTreeState=clean"
	for name in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy \
		kubectl; do
		ln -s kubernetes "$new/$name"
	done
	;;
helm) build helm helm.sh/helm/v4/cmd/helm helm ;;
kwok) build kwok sigs.k8s.io/kwok/cmd/kwok kwok ;;
*)
	echo "nothing is named $what: cluster, helm or kwok" >&2
	exit 2
	;;
esac
chmod 755 "$new"
# Another build may have been faster; then that one stays.
mv -T "$new" "$folder" 2>/dev/null || [ -d "$folder" ]
echo "$what is in $folder" >&2
