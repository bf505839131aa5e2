// etcd as its project builds it: the distribution's packages are older than what Kubernetes asks for.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
