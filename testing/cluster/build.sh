#!/usr/bin/env bash
# Builds the Kubernetes programs that the tests start, static, into one folder.
# build.sh FOLDER: the folder appears when all of it is there, never a part.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?a folder is needed}

command -v go >/dev/null || {
	echo "Go is needed to build the test cluster's programs; install it (go.dev), or set" \
		"KUBEBUILDER_ASSETS to a folder with etcd, kube-apiserver and kube-controller-manager" >&2
	exit 1
}

# Kubernetes refuses to start without its version.
kubernetes=$(sed -nE 's/^\s+k8s\.io\/kubernetes (v[0-9.]+)$/\1/p' "$here/kubernetes/go.mod")
[ "$kubernetes" ] || { echo "no version of k8s.io/kubernetes in kubernetes/go.mod" >&2; exit 1; }
mkdir -p "$(dirname "$folder")"
new=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$new"' EXIT

build() { # module, binary, further linker flags
	echo "building $2: some minutes on the first run" >&2
	(cd "$here/$1" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w $3" -o "$new/$2" .)
}

version=k8s.io/component-base/version
build etcd etcd ""
build kubernetes kubernetes "-X $version.gitVersion=$kubernetes -X $version.gitMajor=1 \
	-X $version.gitMinor=$(cut -d. -f2 <<<"$kubernetes") -X $version.gitTreeState=clean"
for name in kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl; do
	ln -s kubernetes "$new/$name"
done
chmod 755 "$new"
mv -T "$new" "$folder"
trap - EXIT
echo "test cluster programs are in $folder" >&2
