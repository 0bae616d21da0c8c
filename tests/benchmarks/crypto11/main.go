// Go's crypto11 as a client of the benchmark. It pools sessions and keeps them open.
//
//	crypto11 MODULE TOKEN-LABEL KEY-PREFIX
//
// The first line on standard input is the PIN, each further line a turn; turns.py says what
// that is.
package main

import (
	"bufio"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/ThalesIgnite/crypto11"
)

type caller struct {
	laps   []int64
	total  int
	result []byte
	err    error
}

type answer struct {
	Operations int      `json:"operations"`
	Seconds    float64  `json:"seconds"`
	Total      int      `json:"total"`
	P50        float64  `json:"p50_us"`
	P99        float64  `json:"p99_us"`
	Samples    []string `json:"samples"`
}

func fail(err error) {
	said, _ := json.Marshal(map[string]string{"error": err.Error()})
	fmt.Println(string(said))
	os.Exit(1)
}

func percentile(laps []int64, percent int) float64 {
	if len(laps) == 0 {
		return 0
	}
	return float64(laps[(len(laps)*percent+99)/100-1]) / 1000
}

func (c *caller) call(key crypto11.Signer, digest []byte, start, stop time.Time) {
	for {
		began := time.Now()
		if !began.Before(stop) {
			return
		}
		if c.result, c.err = key.Sign(rand.Reader, digest, crypto.SHA256); c.err != nil {
			return
		}
		ended := time.Now()
		c.total++
		if !ended.Before(start) && !ended.After(stop) {
			c.laps = append(c.laps, int64(ended.Sub(began)))
		}
	}
}

func turn(key crypto11.Signer, digest []byte, count int, warm, seconds float64) answer {
	callers := make([]caller, count)
	var group sync.WaitGroup
	start := time.Now().Add(time.Duration(warm * 1e9))
	stop := start.Add(time.Duration(seconds * 1e9))
	for i := range callers {
		group.Add(1)
		go func(c *caller) {
			defer group.Done()
			c.call(key, digest, start, stop)
		}(&callers[i])
	}
	group.Wait()
	var laps []int64
	told := answer{Seconds: seconds, Samples: []string{}}
	for _, c := range callers {
		if c.err != nil {
			fail(c.err)
		}
		laps = append(laps, c.laps...)
		told.Total += c.total
		if c.result != nil && len(told.Samples) < 4 {
			told.Samples = append(told.Samples, hex.EncodeToString(c.result))
		}
	}
	sort.Slice(laps, func(i, j int) bool { return laps[i] < laps[j] })
	told.Operations = len(laps)
	told.P50, told.P99 = percentile(laps, 50), percentile(laps, 99)
	return told
}

func main() {
	input := bufio.NewScanner(os.Stdin)
	input.Scan()
	context, err := crypto11.Configure(&crypto11.Config{
		Path: os.Args[1], TokenLabel: os.Args[2], Pin: input.Text(),
	})
	if err != nil {
		fail(err)
	}
	data := make([]byte, 32)
	for i := range data {
		data[i] = byte(i)
	}
	hashed := sha256.Sum256(data)
	keys := map[string]crypto11.Signer{}
	fmt.Println(`{"ready": true}`)
	for input.Scan() {
		var name string
		var count int
		var warm, seconds float64
		if _, err := fmt.Sscan(input.Text(), &name, &count, &warm, &seconds); err != nil {
			fail(err)
		}
		if keys[name] == nil {
			label := strings.Join([]string{os.Args[3], name}, "-")
			if keys[name], err = context.FindKeyPair(nil, []byte(label)); err != nil {
				fail(err)
			}
		}
		digest := data
		if name == "rsa2048" {
			digest = hashed[:]
		}
		said, _ := json.Marshal(turn(keys[name], digest, count, warm, seconds))
		fmt.Println(string(said))
	}
}
