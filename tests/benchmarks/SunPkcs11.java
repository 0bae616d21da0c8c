import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.Provider;
import java.security.Security;
import java.security.Signature;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.List;
import java.util.Locale;
import java.util.concurrent.CountDownLatch;

/**
 * Java's own PKCS#11 provider as a client of the benchmark. It pools sessions and keeps them open.
 *
 * <p>java SunPkcs11 MODULE SLOT-ID KEY-PREFIX. The first line on standard input is the PIN, each
 * further line a turn; turns.py says what that is.
 */
public final class SunPkcs11 {
    private static final byte[] DATA = new byte[32];

    static {
        for (int i = 0; i < DATA.length; i++) {
            DATA[i] = (byte) i;
        }
    }

    /** A thread that calls, again as soon as it has its result. */
    private static final class Caller extends Thread {
        private final Provider provider;
        private final String algorithm;
        private final PrivateKey key;
        private final CountDownLatch ready;
        private final CountDownLatch go;
        volatile long start;
        volatile long stop;
        long[] laps = new long[4096];
        int count;
        long total;
        byte[] result;
        Exception failure;

        Caller(
                Provider provider,
                String algorithm,
                PrivateKey key,
                CountDownLatch ready,
                CountDownLatch go) {
            this.provider = provider;
            this.algorithm = algorithm;
            this.key = key;
            this.ready = ready;
            this.go = go;
        }

        @Override
        public void run() {
            try {
                Signature signature = Signature.getInstance(algorithm, provider);
                ready.countDown();
                go.await();
                long began;
                while ((began = System.nanoTime()) < stop) {
                    signature.initSign(key);
                    signature.update(DATA);
                    result = signature.sign();
                    long ended = System.nanoTime();
                    total++;
                    if (ended >= start && ended <= stop) {
                        if (count == laps.length) {
                            laps = Arrays.copyOf(laps, 2 * count);
                        }
                        laps[count++] = ended - began;
                    }
                }
            } catch (Exception error) {
                failure = error;
                ready.countDown();
            }
        }
    }

    private static double percentile(long[] laps, int percent) {
        return laps.length == 0
                ? 0
                : laps[(int) (((long) laps.length * percent + 99) / 100 - 1)] / 1000.0;
    }

    private static String answer(List<Caller> callers, double seconds) throws Exception {
        int count = 0;
        long total = 0;
        List<String> samples = new ArrayList<>();
        for (Caller caller : callers) {
            if (caller.failure != null) {
                throw caller.failure;
            }
            count += caller.count;
            total += caller.total;
            if (caller.result != null && samples.size() < 4) {
                samples.add('"' + HexFormat.of().formatHex(caller.result) + '"');
            }
        }
        long[] laps = new long[count];
        int at = 0;
        for (Caller caller : callers) {
            System.arraycopy(caller.laps, 0, laps, at, caller.count);
            at += caller.count;
        }
        Arrays.sort(laps);
        return String.format(
                Locale.ROOT,
                "{\"operations\": %d, \"seconds\": %.6f, \"total\": %d, \"p50_us\": %.3f,"
                        + " \"p99_us\": %.3f, \"samples\": %s}",
                count,
                seconds,
                total,
                percentile(laps, 50),
                percentile(laps, 99),
                samples);
    }

    private static String turn(Provider provider, KeyStore store, String prefix, String line)
            throws Exception {
        String[] words = line.split(" ");
        boolean rsa = words[0].equals("rsa2048");
        PrivateKey key = (PrivateKey) store.getKey(prefix + "-" + words[0], null);
        int count = Integer.parseInt(words[1]);
        CountDownLatch ready = new CountDownLatch(count);
        CountDownLatch go = new CountDownLatch(1);
        List<Caller> callers = new ArrayList<>();
        for (int i = 0; i < count; i++) {
            String algorithm = rsa ? "SHA256withRSA" : "NONEwithECDSA";
            callers.add(new Caller(provider, algorithm, key, ready, go));
            callers.get(i).start();
        }
        ready.await();
        long start = System.nanoTime() + Math.round(Double.parseDouble(words[2]) * 1e9);
        double seconds = Double.parseDouble(words[3]);
        for (Caller caller : callers) {
            caller.start = start;
            caller.stop = start + Math.round(seconds * 1e9);
        }
        go.countDown();
        for (Caller caller : callers) {
            caller.join();
        }
        return answer(callers, seconds);
    }

    public static void main(String[] words) throws Exception {
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in));
        char[] pin = input.readLine().toCharArray();
        String settings =
                String.format("--name=bench\nlibrary=%s\nslot=%s\n", words[0], words[1]);
        Provider provider = Security.getProvider("SunPKCS11").configure(settings);
        KeyStore store = KeyStore.getInstance("PKCS11", provider);
        store.load(null, pin);
        System.out.println("{\"ready\": true}");
        String line;
        while ((line = input.readLine()) != null) {
            System.out.println(turn(provider, store, words[2], line));
        }
        System.exit(0);
    }
}
